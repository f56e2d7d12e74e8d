"""Who may come in now: how many jobs may wait, and how many requests one key may have open."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import Depends, Request
from gesso_contracts import subjects
from gesso_core.errors import Unavailable
from prometheus_client import CollectorRegistry, Gauge

from gesso_services.gateway.auth import Caller
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.problems import EdgeError
from gesso_services.runtime.connection import BROKER_AWAY


class Admission:
    """Counts what is open and looks at the queue before it lets another job in."""

    def __init__(self, fabric: Fabric, registry: CollectorRegistry) -> None:
        self.fabric = fabric
        self._open: Counter[str] = Counter()
        self._depths: dict[str, tuple[float, int]] = {}
        self._held: Counter[str] = Counter()
        self._gauge = Gauge(
            "gesso_queue_depth", "Jobs that wait or run.", ["service"], registry=registry
        )

    async def depth(self, service: str) -> int:
        """Jobs that wait or run in ``service``; measured now and then, counted in between."""
        measured_at, depth = self._depths.get(service, (float("-inf"), 0))
        if time.monotonic() - measured_at < self.fabric.settings.depth_ttl_s:
            return depth
        try:
            info = await self.fabric.bus.js.consumer_info(subjects.STREAM_JOBS, service)
        except BROKER_AWAY as error:
            raise Unavailable("the broker does not answer; try again in a moment") from error
        depth = int(info.num_pending or 0) + int(info.num_ack_pending or 0)
        self._depths[service] = (time.monotonic(), depth)
        self._gauge.labels(service).set(depth)
        return depth

    async def admit(self, service: str, jobs: int = 1) -> None:
        """Let ``jobs`` more into the queue of ``service``, or refuse with 429."""
        async with self.admitted(service, jobs):
            pass

    @asynccontextmanager
    async def admitted(self, service: str, jobs: int = 1) -> AsyncIterator[None]:
        """The same, with the places held while what comes along is looked at; where that raises,
        they are free again.
        """
        waiting = await self.depth(service) + self._held[service]
        most = self.fabric.settings.max_queue_depth
        if waiting + jobs > most:
            raise EdgeError(
                429,
                "queue_full",
                f"{waiting} jobs are in the queue of {service!r}, which takes {most}; "
                "try again when some are done",
                headers={"Retry-After": "5"},
            )
        self._held[service] += jobs
        try:
            yield
        finally:
            self._held[service] -= jobs
        measured_at, depth = self._depths[service]
        self._depths[service] = (measured_at, depth + jobs)

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """One open request of ``caller``; 429 when it has too many."""
        most = self.fabric.settings.max_requests_per_key
        if self._open[caller] >= most:
            raise EdgeError(
                429,
                "too_many_requests",
                f"this key has {most} requests open, as many as it may; wait for one of them",
                headers={"Retry-After": "1"},
            )
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


async def of(request: Request) -> Admission:
    """The admission of the application that serves ``request``."""
    admission: Admission = request.app.state.admission
    return admission


Door = Annotated[Admission, Depends(of)]


async def open_place(caller: Caller, door: Door) -> AsyncIterator[None]:
    """Hold a place for as long as the answer takes, streams included."""
    with door.place(caller):
        yield
