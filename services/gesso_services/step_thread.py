"""The one thread of a replica that runs its models: the step batcher, while anybody is in it."""

import asyncio
import logging
import threading
from collections.abc import Callable

import torch
from gesso_core.errors import Unavailable
from gesso_core.pipelines.step_batcher import Advances, D, StepBatcher, Ticket

from gesso_services.runtime.job_context import JobContext

log = logging.getLogger(__name__)

STOPPING = "the replica that works on this stops; another one will start it again"


class StepThread:
    """Takes drafts from any thread and advances them in its own.

    ``on_batch`` hears how many drafts shared each step; ``threads`` are the CPU threads that one
    forward may use.
    """

    def __init__(
        self, batcher: StepBatcher, *, threads: int, on_batch: Callable[[int], None]
    ) -> None:
        self.batcher = batcher
        self._threads = threads
        self._on_batch = on_batch
        self._work = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        """Begin to wait for drafts."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now; whoever is still here ends with `Unavailable`."""
        with self._work:
            self._stopped = True
            self._work.notify()

    def add(
        self,
        model: Advances[D],
        draft: D,
        *,
        job_id: str,
        on_step: Callable[[D], None],
        is_withdrawn: Callable[[], bool],
    ) -> Ticket[D]:
        """Let a draft in; see `StepBatcher.add`. `Unavailable` once stopped."""
        with self._work:
            if self._stopped:
                raise Unavailable(STOPPING)
            ticket = self.batcher.add(
                model, draft, ticket_id=job_id, on_step=on_step, is_withdrawn=is_withdrawn
            )
            self._work.notify()
        return ticket

    async def finish(
        self, model: Advances[D], draft: D, job: JobContext, *, on_step: Callable[[D], None]
    ) -> D:
        """The finished draft of a job. `Cancelled` when the job is withdrawn.

        A caller that is gone before the end takes its draft along. ``on_step`` gets the draft after
        every step, in the thread of the steps.
        """
        deserted = False
        ticket = self.add(
            model,
            draft,
            job_id=job.id,
            on_step=on_step,
            is_withdrawn=lambda: job.cancelled or deserted,
        )
        try:
            return await asyncio.wrap_future(ticket.outcome)
        finally:
            deserted = True

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopped or len(self.batcher) > 0)
                if self._stopped:
                    break
            try:
                if size := self.batcher.step():
                    self._on_batch(size)
            except Exception as error:
                log.exception("a step failed")
                self.batcher.abandon(error)
        self.batcher.abandon(Unavailable(STOPPING))
