"""What the routes reach the services with: one connection to the broker, made in the background.

The gateway answers ``/health/live`` before the broker is there; every route that needs the broker
says 503 until it is. Nothing here is kept between requests but caches, so copies may come and go.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from gesso_core.errors import GessoError, Unavailable

from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.settings import BusSettings

log = logging.getLogger(__name__)

CONNECT_AGAIN_S = 1.0


class Fabric:
    """Bus, job book and blobs of one gateway."""

    def __init__(self, settings: GatewaySettings, bus_settings: BusSettings) -> None:
        self.settings = settings
        self._bus_settings = bus_settings
        self._bus: Bus | None = None
        self._jobs: JobStore | None = None
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def is_connected(self) -> bool:
        """Is the broker there, and has it been provisioned?"""
        return self._jobs is not None and self.bus.is_connected

    @property
    def bus(self) -> Bus:
        """The connection; ``Unavailable`` before the first one stands."""
        if self._bus is None:
            raise Unavailable("the gateway has not reached the broker yet; try again in a moment")
        return self._bus

    @property
    def jobs(self) -> JobStore:
        """The book of jobs; ``Unavailable`` before the broker has been provisioned."""
        if self._jobs is None:
            raise Unavailable("the gateway has not reached the broker yet; try again in a moment")
        return self._jobs

    @property
    def blobs(self) -> BlobStore:
        """Where pictures lie."""
        return BlobStore(self.bus)

    def in_background(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run ``work`` in a task that outlives the request it came from."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def open(self) -> None:
        """Connect, for as long as it takes."""
        while self._jobs is None:
            try:
                self._bus = self._bus or await Bus.connect("gateway", self._bus_settings)
                self._jobs = await JobStore.open(self._bus)
            except GessoError as error:
                log.warning("%s", error.message)
                await asyncio.sleep(CONNECT_AGAIN_S)

    async def close(self) -> None:
        """Stop background work and leave the broker."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._bus is not None:
            await self._bus.close()


async def of(request: Request) -> Fabric:
    """The fabric of the application that serves ``request``."""
    # async, because FastAPI sends plain functions through its thread pool
    fabric: Fabric = request.app.state.fabric
    return fabric


Here = Annotated[Fabric, Depends(of)]
