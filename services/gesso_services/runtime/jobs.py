"""The book of jobs: submit, look up, list, cancel, and the one way in which a state may change.

States live in the key-value bucket ``jobs``. Every change is compare-and-set and follows the table
``TRANSITIONS``, so of two workers that finish the same job only one is seen.
"""

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Self

from gesso_contracts import encode, headers, limits, parse, subjects
from gesso_contracts.base import Message
from gesso_contracts.jobs import TRANSITIONS, CancelJob, Job, JobState, JobStateChanged
from gesso_core.errors import Conflict, InvalidRequest, NotFound, Overloaded, Unavailable
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from gesso_services.runtime import trace
from gesso_services.runtime.connection import BROKER_AWAY, Bus

log = logging.getLogger(__name__)

Change = Callable[[JobState], JobState | None]


class Entry(NamedTuple):
    """A state and the revision under which the bucket keeps it."""

    state: JobState
    revision: int


class Changed(NamedTuple):
    """The state after an attempted change; ``won`` is ``True`` when the change was made by us."""

    state: JobState
    won: bool


class JobStore:
    """Reads and writes job states. Make it with ``JobStore.open``."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self.bus = bus
        self.bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> Self:
        """The store behind ``bus``; ``Unavailable`` when the broker has not been provisioned."""
        try:
            return cls(bus, await bus.js.key_value(subjects.BUCKET_JOBS))
        except (NatsError, TimeoutError) as error:
            raise Unavailable(
                f"the broker has no bucket {subjects.BUCKET_JOBS!r}; has it been provisioned?"
            ) from error

    async def submit(
        self, service: str, kind: str, request: Message, *, job_id: str | None = None
    ) -> tuple[JobState, bool]:
        """Accept a job: when this returns, the job is durable. ``True`` when it is new.

        The same id with the same request is the same job; with another request it is ``Conflict``.
        """
        job = make_job(service, kind, request, job_id or uuid.uuid4().hex)
        data, header = encode(job)
        if len(data) > limits.JOB_MESSAGE_BYTES:
            raise InvalidRequest(
                f"a job of {len(data)} bytes; at most {limits.JOB_MESSAGE_BYTES} are taken, "
                "send large inputs as blobs"
            )
        state = first_state(job)
        try:
            await self.bucket.create(job.id, state.model_dump_json().encode())
            created = True
        except KeyWrongLastSequenceError:
            state, created = await self._same_job(job.id, state), False
        except BROKER_AWAY as error:
            raise _try_again(job.id) from error
        if state.status == "queued":
            await self._enqueue(job, data, header, forget=created)
        return state, created

    async def get(self, job_id: str) -> JobState:
        """The state of ``job_id``; ``NotFound`` when there is none."""
        return (await self.entry(job_id)).state

    async def entry(self, job_id: str) -> Entry:
        """The state of ``job_id`` with its revision."""
        try:
            return await self._read(job_id)
        except BROKER_AWAY as error:
            raise Unavailable("the broker does not answer; try again") from error

    async def cancel(self, job_id: str) -> JobState:
        """Withdraw a job: at once while it is queued, at its next step while it runs."""
        changed = await self.change(job_id, _withdrawn)
        if changed.state.status == "running":
            data, header = encode(CancelJob(job_id=job_id))
            await self.bus.nc.publish(subjects.cancel(changed.state.service), data, headers=header)
        if changed.won:
            await self.announce(changed.state)
        return changed.state

    async def change(self, job_id: str, change: Change, *, patient: bool = False) -> Changed:
        """Apply ``change`` to the current state until nobody comes between.

        ``change`` gets the current state and gives the next one, or ``None`` to leave it. With
        ``patient`` it outlasts any absence of the broker, otherwise that is ``Unavailable``.
        """
        wanted: JobState | None = None
        while True:
            try:
                state, revision = await self._read(job_id)
                if state == wanted:
                    return Changed(state, won=True)  # written by us; only the answer was lost
                wanted = change(state)
                if wanted is None:
                    return Changed(state, won=False)
                assert wanted.status in TRANSITIONS[state.status], (state.status, wanted.status)
                await self.bucket.update(job_id, wanted.model_dump_json().encode(), last=revision)
                return Changed(wanted, won=True)
            except KeyWrongLastSequenceError:
                continue
            except BROKER_AWAY as error:
                if not patient or self.bus.is_closed:
                    raise Unavailable("the broker does not answer; try again") from error
                await self.bus.wait_connected()
                await asyncio.sleep(self.bus.settings.reconnect_wait_s)

    async def announce(self, state: JobState) -> None:
        """Tell subscribers about ``state``; nobody waits for them."""
        data, header = encode(JobStateChanged(state=state))
        header[headers.TRACEPARENT] = trace.current_trace()
        try:
            await self.bus.nc.publish(subjects.event(state.id, "state"), data, headers=header)
        except NatsError as error:
            # Followers read the bucket from time to time, so they learn of it anyway.
            log.warning("could not announce a state: %s", error or type(error).__name__)

    async def _read(self, job_id: str) -> Entry:
        try:
            found = await self.bucket.get(_key(job_id))
        except KeyNotFoundError as error:
            raise NotFound(f"no job {job_id!r}; jobs are forgotten after a while") from error
        assert found.value is not None
        assert found.revision is not None
        return Entry(parse(found.value, JobState), found.revision)

    async def _same_job(self, job_id: str, wanted: JobState) -> JobState:
        state = await self.get(job_id)
        if state.request_sha256 != wanted.request_sha256:
            raise Conflict(
                f"job {job_id!r} exists with another request; use a new id for a new request",
                field="id",
            )
        return state

    async def _enqueue(
        self, job: Job, data: bytes, header: dict[str, str], *, forget: bool
    ) -> None:
        header[headers.MESSAGE_ID] = job.id
        header[headers.TRACEPARENT] = trace.child_of(trace.current_trace())
        try:
            await self.bus.js.publish(
                subjects.job(job.service, job.kind),
                data,
                headers=header,
                stream=subjects.STREAM_JOBS,
            )
        except (APIError, MaxPayloadError) as error:
            if forget:
                await self.bucket.delete(job.id)
            raise Overloaded(f"the queue takes no more jobs ({error}); try again later") from error
        except BROKER_AWAY as error:
            raise _try_again(job.id) from error


def make_job(service: str, kind: str, request: Message, job_id: str) -> Job:
    """``request`` as it will lie in the queue."""
    return Job(
        id=_key(job_id),
        service=service,
        kind=kind,
        request_schema=request.schema_name(),
        request=request.model_dump(mode="json"),
        submitted_at=now(),
    )


def first_state(job: Job) -> JobState:
    """The state of a job that has just been submitted."""
    return JobState(
        id=job.id,
        service=job.service,
        kind=job.kind,
        status="queued",
        created_at=job.submitted_at,
        updated_at=job.submitted_at,
        request_sha256=request_sha256(job),
    )


def request_sha256(job: Job) -> str:
    """Hash of what was asked for; the same whatever the order of the fields."""
    asked = [job.service, job.kind, job.request_schema, job.request]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def evolve(state: JobState, **changes: object) -> JobState:
    """``state`` with ``changes``, later than it by the clock, at least by a microsecond."""
    later = max(now(), state.updated_at + timedelta(microseconds=1))
    return state.model_copy(update={"updated_at": later, **changes})


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def _withdrawn(state: JobState) -> JobState | None:
    if state.status == "queued":
        return evolve(state, status="cancelled", cancel_requested=True)
    if state.status == "running" and not state.cancel_requested:
        return evolve(state, cancel_requested=True)
    return None


def _key(job_id: str) -> str:
    try:
        return subjects.token(job_id)
    except ValueError as error:
        raise InvalidRequest(f"job id {error}", field="id") from error


def _try_again(job_id: str) -> Unavailable:
    return Unavailable(
        f"the broker did not confirm job {job_id!r}; submit it again with the same id"
    )
