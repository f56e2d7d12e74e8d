"""The worker of one replica: takes jobs while it has free slots and sees each through to its end.

A job is acknowledged only after its final state is written, so whatever dies in between, the broker
gives the job to somebody again. What happens to a job, by outcome of its handler:

====================================  ========================================================
a result                              ``succeeded``
``Cancelled``                         ``cancelled``
``Unavailable``                       back to the queue with a growing delay, for a limited time
any other ``GessoError``, no memory   ``failed`` with the problem; the replica lives on
any other exception, or a dead worker tried again, at most ``max_attempts`` times, then ``failed``
                                      with code ``poison``, and the job lies in the dead letters
the replica stops                     back to the queue at once, the attempt is not counted
====================================  ========================================================
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from gesso_contracts import ContractError, decode, subjects
from gesso_contracts import headers as names
from gesso_contracts.jobs import CancelJob, Job, JobState
from gesso_core.errors import NotFound
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from gesso_services.runtime import outcome as ends
from gesso_services.runtime import trace
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.dead_letters import bury, bury_unreadable
from gesso_services.runtime.feed import JobFeed
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.job_notes import Notes
from gesso_services.runtime.jobs import Changed, JobStore, evolve, now
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.outcome import Ending, JobKind
from gesso_services.runtime.settings import JobSettings

log = logging.getLogger(__name__)

GIVE_BACK_S = 2.0


class RunningJob:
    """A job in a slot, with the message that has to be kept alive and answered at the end."""

    def __init__(self, job: Job, message: Msg, context: JobContext) -> None:
        self.job = job
        self.message = message
        self.context = context


class Worker:
    """Pulls the jobs of ``service`` and runs up to ``slots`` of them at once."""

    def __init__(
        self,
        bus: Bus,
        store: JobStore,
        service: str,
        kinds: Mapping[str, JobKind],
        *,
        slots: int,
        settings: JobSettings,
        metrics: Metrics,
    ) -> None:
        self.bus = bus
        self.store = store
        self.service = service
        self.kinds = kinds
        self.settings = settings
        self.metrics = metrics
        self._slots = asyncio.Semaphore(slots)
        self._feed = JobFeed(bus, service, expires_s=settings.fetch_expires_s)
        self._running: dict[str, RunningJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._cancels: Any = None
        self._stopping = False

    @property
    def running(self) -> int:
        """Jobs in a slot right now."""
        return len(self._running)

    @property
    def is_healthy(self) -> bool:
        """Are the loops that take jobs and keep them alive still there?"""
        return bool(self._loops) and not any(loop.done() for loop in self._loops)

    async def start(self) -> None:
        """Hear cancellations, then take jobs."""
        self._cancels = await self.bus.nc.subscribe(
            subjects.cancel(self.service), cb=self._on_cancel
        )
        await self.bus.ready()
        self._loops = [asyncio.create_task(self._take()), asyncio.create_task(self._keep_alive())]

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs; what still runs after ``grace_s`` seconds goes back to the queue."""
        self._stopping = True
        await self._feed.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                _, stuck = await asyncio.wait(late, timeout=GIVE_BACK_S)
                for task in stuck:
                    task.cancel()
                await asyncio.wait(late, timeout=1.0)
        for loop in self._loops:
            loop.cancel()
        if self._cancels is not None and self.bus.is_connected:
            with contextlib.suppress(NatsError, OSError):
                await self._cancels.unsubscribe()

    async def _take(self) -> None:
        while True:
            await self._slots.acquire()
            message = await self._feed.next()
            if message is None:
                return
            task = asyncio.create_task(self._see_through(message))
            self._tasks.add(task)
            task.add_done_callback(self._give_slot_back)

    def _give_slot_back(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._slots.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            # The message stays unanswered, so the broker will deliver it again.
            log.error("a job was left unfinished", exc_info=error)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self.settings.ack_wait_s / 3)
            for running in list(self._running.values()):
                with contextlib.suppress(NatsError):  # said again next time
                    await running.message.in_progress()

    async def _on_cancel(self, message: Msg) -> None:
        with contextlib.suppress(ContractError):
            job_id = decode(message.data, message.headers, CancelJob).job_id
            if running := self._running.get(job_id):
                running.context.withdraw()

    async def _see_through(self, message: Msg) -> None:
        try:
            job = decode(message.data, message.headers, Job)
        except ContractError as error:
            await bury_unreadable(self.bus, self.service, message, str(error))
            await self.bus.until_done(message.term)
            return
        with trace.use_trace((message.headers or {}).get(names.TRACEPARENT), job.id):
            if known := self._running.get(job.id):
                await self._delivered_again(known, message)
                return
            notes = Notes(self.store, save_every_s=self.settings.save_progress_every_s)
            context = JobContext(
                job.id, publish=notes.publish, previews_per_s=self.settings.previews_per_s
            )
            notes.on_withdrawn = context.withdraw
            self._running[job.id] = RunningJob(job, message, context)
            try:
                await self._run(self._running[job.id])
            finally:
                del self._running[job.id]

    async def _delivered_again(self, running: RunningJob, message: Msg) -> None:
        if message.metadata.sequence.stream == running.message.metadata.sequence.stream:
            running.message = message  # the broker lost track of us; this is the one to answer
        else:
            await message.ack()  # a second message of the same job

    async def _run(self, running: RunningJob) -> None:
        job = running.job
        sequence = running.message.metadata.sequence.stream
        before, ending = await self._begin(job, sequence)
        if ending is not None:
            await self._end(running, before, ending)
            if ending.status is not None:
                self.metrics.job_skipped(job.kind, ending.status)
            return
        waited = (now() - before.created_at).total_seconds()
        self.metrics.job_started(job.kind, waited)
        log.info("started, attempt %d, waited %.2f s", before.attempt, waited)
        begun, status = time.perf_counter(), "retried"
        try:
            ending = await ends.of_handler(self.kinds, job, running.context, before, self.settings)
            if ending.status not in (None, "queued"):
                status = str(ending.status)
            await running.context.close()
            await self._end(running, before, ending)
        except asyncio.CancelledError as error:
            if self._stopping:
                await self._end(running, before, ends.given_back())
                raise
            # A handler that lets a cancellation of its own escape has failed like any other.
            await self._end(running, before, ends.try_again(error, before, self.settings))
        finally:
            self.metrics.job_ended(job.kind, status, time.perf_counter() - begun)

    async def _begin(self, job: Job, sequence: int) -> tuple[JobState, Ending | None]:
        """Mark the job as running, or say how it ends without running."""
        ending: Ending | None = None

        def start(state: JobState) -> JobState | None:
            nonlocal ending
            ending = ends.before_start(state, sequence, self.settings.max_attempts)
            if ending is not None:
                return None
            return evolve(
                state,
                status="running",
                attempt=state.attempt + 1,
                started_at=now(),
                queue_sequence=sequence,
            )

        try:
            changed = await self.store.change(job.id, start, patient=True)
        except NotFound:
            return ends.unknown(job), ends.skipped()
        if changed.won:
            await self.store.announce(changed.state)
        return changed.state, ending if not changed.won else None

    async def _end(self, running: RunningJob, before: JobState, ending: Ending) -> None:
        """Bury if due, write the state, tell about it, answer the message — in this order."""
        if ending.bury:
            assert ending.problem is not None
            deliveries = running.message.metadata.num_delivered
            reason = ending.problem.detail
            await bury(self.bus, running.job, deliveries=deliveries, reason=reason)
        if ending.status is not None:
            changed = await self._write(running, before, ending)
            if changed.won:
                await self.store.announce(changed.state)
                log.info("%s after attempt %d", changed.state.status, changed.state.attempt)
            elif not changed.state.is_final:
                return  # another worker has this job by now, and answers its own delivery
            else:
                ending = ends.skipped()
        await self.bus.until_done(lambda: _answer(running.message, ending))

    async def _write(self, running: RunningJob, before: JobState, ending: Ending) -> Changed:
        context = running.context

        def finish(state: JobState) -> JobState | None:
            return ends.apply(ending, state, before, context.step, context.total_steps)

        return await self.store.change(running.job.id, finish, patient=True)


async def _answer(message: Msg, ending: Ending) -> None:
    if ending.answer == "ack":
        await message.ack()
    elif ending.answer == "term":
        await message.term()
    else:
        await message.nak(delay=ending.delay_s or None)
