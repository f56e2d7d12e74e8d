"""Following one job: its state now, then what happens to it, until it ends.

Events are told once and to whoever listens; a follower that missed one finds it in the bucket,
which it reads from time to time. A slow follower loses progress and previews, never a state.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from gesso_contracts import ContractError, decode, subjects
from gesso_contracts.jobs import JobPreview, JobProgress, JobState, JobStateChanged, JobText
from gesso_core.errors import Unavailable
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from gesso_services.runtime.jobs import JobStore

Event = JobProgress | JobPreview | JobText | JobStateChanged

LOOK_EVERY_S = 2.0
EVENTS_KEPT = 64

_TYPES: dict[str, type[JobProgress] | type[JobPreview] | type[JobText] | type[JobStateChanged]] = {
    "progress": JobProgress,
    "preview": JobPreview,
    "text": JobText,
    "state": JobStateChanged,
}


class Follower:
    """An async iterator over the events of one job; ends after the final state."""

    def __init__(self, store: JobStore, job_id: str, *, look_first: bool) -> None:
        self.store = store
        self.job_id = job_id
        self._look = look_first
        self._last: JobState | None = None
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            if self._last is not None and self._last.is_final:
                raise StopAsyncIteration
            event = await self._next()
            if event is None:
                continue
            if isinstance(event, JobStateChanged):
                if self._last is not None and event.state.updated_at <= self._last.updated_at:
                    continue
                self._last = event.state
            return event

    async def on_message(self, message: Msg) -> None:
        """Take one event from the bus."""
        with suppress(ContractError):  # an event of a newer version is not for us
            self.add(
                decode(message.data, message.headers, _TYPES[message.subject.rpartition(".")[2]])
            )

    def add(self, event: Event) -> None:
        """Keep ``event``; when there are too many, the oldest that is not a state goes."""
        self._events.append(event)
        if len(self._events) > EVENTS_KEPT:
            for index, kept in enumerate(self._events):
                if not isinstance(kept, JobStateChanged):
                    del self._events[index]
                    break
        self._arrived.set()

    async def _next(self) -> Event | None:
        if self._look:
            self._look = False
            return await self._current()
        if self._events:
            return self._events.popleft()
        self._arrived.clear()
        try:
            async with asyncio.timeout(LOOK_EVERY_S):
                await self._arrived.wait()
        except TimeoutError:
            with suppress(Unavailable):
                return await self._current()
        return None

    async def _current(self) -> JobStateChanged:
        return JobStateChanged(state=await self.store.get(self.job_id))


@asynccontextmanager
async def follow(store: JobStore, job_id: str, *, new: bool = False) -> AsyncIterator[Follower]:
    """Follow ``job_id``; the first event is its state now, so a late subscriber is up to date.

    With ``new`` the job may be submitted inside the block and its first state is not looked up.
    """
    follower = Follower(store, job_id, look_first=not new)
    # The broker handles this SUB before any later request of the same connection, so nothing
    # falls between subscribing and reading the state.
    subscription: Any = await store.bus.nc.subscribe(
        subjects.all_events(job_id), cb=follower.on_message
    )
    try:
        yield follower
    finally:
        with suppress(NatsError):
            await subscription.unsubscribe()


async def wait_for(store: JobStore, job_id: str, timeout: float) -> JobState:
    """The final state of ``job_id``, or the latest one after ``timeout`` seconds."""
    state: JobState | None = None
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout), follow(store, job_id) as events:
            async for event in events:
                if isinstance(event, JobStateChanged):
                    state = event.state
    return state if state is not None else await store.get(job_id)
