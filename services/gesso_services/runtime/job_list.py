"""Pages of jobs, last changed first.

The bucket keeps one message per job, in the order of the last change. A page walks that order from
the end in growing windows, each read with one batched direct get, so nothing has to be indexed.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gesso_contracts import limits, parse, subjects
from gesso_contracts.jobs import JobList, JobState, JobStatus
from gesso_core.errors import InvalidRequest, Unavailable
from nats.aio.msg import Msg

from gesso_services.runtime.connection import BROKER_AWAY, Bus
from gesso_services.runtime.jobs import Entry, JobStore

STREAM = f"KV_{subjects.BUCKET_JOBS}"
FIRST_WINDOW = 256
LAST_WINDOW = 8192
MAX_SCANNED = 50_000
BATCH = 256
NO_END = 2**63


async def list_jobs(
    store: JobStore,
    *,
    status: JobStatus | None = None,
    service: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> JobList:
    """At most ``limit`` jobs, those of one status or service if given."""
    if not 1 <= limit <= limits.MAX_LIST:
        raise InvalidRequest(f"limit {limit}; allowed is 1 to {limits.MAX_LIST}", field="limit")
    try:
        return await _page(store, status, service, limit, _position(cursor))
    except BROKER_AWAY as error:
        raise Unavailable("the broker does not answer; try again") from error


async def _page(
    store: JobStore, status: JobStatus | None, service: str | None, limit: int, before: int | None
) -> JobList:
    stream = (await store.bus.js.stream_info(STREAM)).state
    # The first page has no end: a job that changes while we look moves behind `last_seq`.
    end = before or NO_END
    upper = min(end, stream.last_seq + 1)
    oldest_allowed = max(stream.first_seq, upper - MAX_SCANNED)
    found: list[Entry] = []
    window = FIRST_WINDOW
    async with _reader(store.bus) as reader:
        while upper > oldest_allowed and len(found) < limit:
            lower = max(oldest_allowed, upper - window)
            entries = await reader.read(lower, end)
            found += [entry for entry in reversed(entries) if _fits(entry.state, status, service)]
            upper, end, window = lower, lower, min(2 * window, LAST_WINDOW)
    page = found[:limit]
    more = len(found) > limit or upper > stream.first_seq
    last = page[-1].revision if len(found) >= limit else upper
    return JobList(jobs=[entry.state for entry in page], cursor=str(last) if more else None)


def _fits(state: JobState, status: JobStatus | None, service: str | None) -> bool:
    return status in (None, state.status) and service in (None, state.service)


def _position(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    if not (cursor.isascii() and cursor.isdigit() and 0 < len(cursor) <= 18):
        raise InvalidRequest(
            f"cursor {cursor[:40]!r}; give back the one of the last page", field="cursor"
        )
    return max(1, int(cursor))


class _Reader:
    """Batched direct gets from the bucket through one inbox."""

    def __init__(self, bus: Bus, inbox: str, arrived: "asyncio.Queue[Msg]") -> None:
        self.bus = bus
        self.inbox = inbox
        self.arrived = arrived

    async def read(self, lower: int, upper: int) -> list[Entry]:
        """Every entry with ``lower`` ≤ revision < ``upper``, in order."""
        entries: list[Entry] = []
        while lower < upper:
            batch = await self._batch(lower)
            entries += [_entry(message) for message in batch if message.data]
            if len(batch) < BATCH:
                break
            lower = _revision(batch[-1]) + 1
        return [entry for entry in entries if entry.revision < upper]

    async def _batch(self, start: int) -> list[Msg]:
        request = {"seq": start, "batch": BATCH, "next_by_subj": f"$KV.{subjects.BUCKET_JOBS}.>"}
        await self.bus.nc.publish(
            f"$JS.API.DIRECT.GET.{STREAM}", json.dumps(request).encode(), reply=self.inbox
        )
        messages: list[Msg] = []
        while True:
            async with asyncio.timeout(self.bus.settings.request_timeout_s):
                message = await self.arrived.get()
            if "Status" in (message.headers or {}):  # 204: that was all, 404: nothing at all
                return messages
            messages.append(message)


def _revision(message: Msg) -> int:
    return int((message.headers or {})["Nats-Sequence"])


def _entry(message: Msg) -> Entry:
    return Entry(parse(message.data, JobState), _revision(message))


@asynccontextmanager
async def _reader(bus: Bus) -> AsyncIterator[_Reader]:
    arrived: asyncio.Queue[Msg] = asyncio.Queue()

    async def keep(message: Msg) -> None:
        arrived.put_nowait(message)

    inbox = bus.nc.new_inbox()
    subscription: Any = await bus.nc.subscribe(inbox, cb=keep)
    try:
        yield _Reader(bus, inbox, arrived)
    finally:
        await subscription.unsubscribe()
