"""What a handler gets to talk about its job: progress, previews, words and withdrawal.

``report``, ``preview`` and ``say`` may be called from any thread, return at once and never wait
for a slow subscriber. Progress and cancellation are one call: ``report`` raises when the job was
withdrawn.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable

from gesso_contracts import limits
from gesso_contracts.jobs import JobPreview, JobProgress, JobText
from gesso_core.errors import Cancelled

JobNote = JobProgress | JobPreview | JobText
Publish = Callable[[JobNote], Awaitable[None]]

NOTES_KEPT = 64


class JobContext:
    """One attempt at one job."""

    def __init__(
        self, job_id: str, *, publish: Publish | None = None, previews_per_s: float = 4.0
    ) -> None:
        self.id = job_id
        self.step = 0
        self.total_steps = 0
        self._publish = publish
        self._preview_gap_s = 1.0 / previews_per_s
        self._next_preview = 0.0
        self._withdrawn = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._withdrawn_in_loop = asyncio.Event()
        self._notes: deque[JobNote] = deque(maxlen=NOTES_KEPT)
        self._pump: asyncio.Task[None] | None = None

    @property
    def cancelled(self) -> bool:
        """Has the job been withdrawn?"""
        return self._withdrawn.is_set()

    @property
    def wants_preview(self) -> bool:
        """Would a preview be sent now? Ask before drawing one."""
        return self._publish is not None and time.monotonic() >= self._next_preview

    def report(self, step: int, total: int) -> None:
        """``step`` of ``total`` steps are done. Raises ``Cancelled`` when the job was withdrawn."""
        self.step, self.total_steps = step, total
        if self._withdrawn.is_set():
            raise Cancelled(self.id, after=step)
        progress = min(1.0, step / total) if total else 0.0
        self._note(JobProgress(job_id=self.id, step=step, total_steps=total, progress=progress))

    def preview(self, image: bytes, step: int, media_type: str = "image/webp") -> bool:
        """Show ``image``; dropped (``False``) when too large or too soon after the last one."""
        if not self.wants_preview or len(image) > limits.PREVIEW_BYTES:
            return False
        self._next_preview = time.monotonic() + self._preview_gap_s
        self._note(JobPreview(job_id=self.id, step=step, image=image, media_type=media_type))
        return True

    def say(self, text: str) -> None:
        """The answer so far, from its beginning. Raises ``Cancelled`` when withdrawn."""
        if self._withdrawn.is_set():
            raise Cancelled(self.id, after=self.step)
        self._note(JobText(job_id=self.id, text=text))

    async def wait_cancelled(self) -> None:
        """Return when the job is withdrawn."""
        await self._withdrawn_in_loop.wait()

    def withdraw(self) -> None:
        """Make the next ``report`` raise. Called in the loop of the worker."""
        self._withdrawn.set()
        self._withdrawn_in_loop.set()

    async def close(self) -> None:
        """Return when everything noted so far has been published."""
        # A note from a thread arrives through the loop; let those on their way arrive.
        await asyncio.sleep(0)
        if self._pump is not None:
            await asyncio.wait({self._pump})

    def _note(self, note: JobNote) -> None:
        if self._publish is not None:
            self._loop.call_soon_threadsafe(self._enqueue, note)

    def _enqueue(self, note: JobNote) -> None:
        self._notes.append(note)
        if self._pump is None or self._pump.done():
            self._pump = self._loop.create_task(self._publish_notes())

    async def _publish_notes(self) -> None:
        assert self._publish is not None
        while self._notes:
            await self._publish(self._notes.popleft())
