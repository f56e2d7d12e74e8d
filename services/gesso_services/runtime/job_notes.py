"""Telling about running jobs: all of it to whoever listens, the progress into the book as well."""

import contextlib
import time
from collections.abc import Callable

from gesso_contracts import encode, subjects
from gesso_contracts.jobs import JobProgress, JobState
from gesso_core.errors import NotFound, Unavailable
from nats.errors import Error as NatsError

from gesso_services.runtime import outcome
from gesso_services.runtime.job_context import JobNote
from gesso_services.runtime.jobs import JobStore, evolve


class Notes:
    """Publishes what one job reports, and writes its progress down now and then."""

    def __init__(self, store: JobStore, *, save_every_s: float) -> None:
        self.store = store
        self.save_every_s = save_every_s
        self.on_withdrawn: Callable[[], None] | None = None
        self._saved_at = time.monotonic()

    async def publish(self, note: JobNote) -> None:
        """Tell ``note``; without a broker it is lost, because an old progress helps nobody."""
        bus = self.store.bus
        if not bus.is_connected:
            return
        data, header = encode(note)
        with contextlib.suppress(NatsError):
            await bus.nc.publish(subjects.event(note.job_id, note.event), data, headers=header)
        if isinstance(note, JobProgress):
            await self._save(note.job_id, note.step, note.total_steps)

    async def _save(self, job_id: str, step: int, total_steps: int) -> None:
        """For those who come late."""
        if time.monotonic() - self._saved_at < self.save_every_s:
            return
        self._saved_at = time.monotonic()

        def save(state: JobState) -> JobState | None:
            if state.cancel_requested and self.on_withdrawn is not None:
                self.on_withdrawn()  # in case the message that says so was lost
            if state.status != "running":
                return None
            return outcome.with_progress(evolve(state), step, total_steps)

        with contextlib.suppress(NotFound, Unavailable):
            await self.store.change(job_id, save)
