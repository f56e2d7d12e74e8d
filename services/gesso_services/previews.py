"""Previews of a running job: at most one on its way, and dropped whenever that one is slow."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, Self

from gesso_core.errors import GessoError
from gesso_core.pipelines.step_batcher import D

from gesso_services.painting import Sketch
from gesso_services.runtime.job_context import JobContext

log = logging.getLogger(__name__)


class Previews(Generic[D]):
    """Shows every ``every``-th step of ``job`` (0: none), as WebP bytes from ``paint``.

    Painted is the ``sketch`` of a draft; the draft itself, with all that it remembers, is let go.
    ``offer`` is called in the thread that makes the steps and returns at once.
    """

    def __init__(
        self,
        sketch: Callable[[D], Sketch],
        paint: Callable[[Sketch], Awaitable[bytes]],
        job: JobContext,
        *,
        every: int,
    ) -> None:
        self._sketch, self._paint = sketch, paint
        self._job = job
        self._every = every
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._busy = False  # set in the thread of the steps, cleared in the loop

    def offer(self, draft: D) -> None:
        """Show this draft if it is its turn and nothing else is being painted."""
        due = self._every > 0 and draft.steps_done % self._every == 0 and not draft.done
        if due and not self._busy and self._job.wants_preview:
            self._busy = True
            self._loop.call_soon_threadsafe(self._begin, draft)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop what is still being painted."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _begin(self, draft: D) -> None:
        if not self._closed:
            self._task = self._loop.create_task(self._show(self._sketch(draft), draft.steps_done))

    async def _show(self, sketch: Sketch, step: int) -> None:
        try:
            self._job.preview(await self._paint(sketch), step)
        except GessoError as error:
            log.info("preview dropped: %s", error.message)
        finally:
            self._busy = False
