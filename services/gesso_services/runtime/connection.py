"""The bus: one connection to the broker with the habits that a long-lived service needs.

It reconnects for ever, reports in one line, knows for how long the broker has been away, and closes
without hanging. Each role has its own inbox, because permissions are given per role.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Self, TypeVar

from gesso_core.errors import Unavailable
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import (
    ConnectionReconnectingError,
    NoRespondersError,
    OutboundBufferLimitError,
    SlowConsumerError,
)
from nats.errors import Error as NatsError
from nats.js.errors import NoStreamResponseError, ServiceUnavailableError

from gesso_services.runtime.settings import BusSettings, Role

log = logging.getLogger(__name__)

T = TypeVar("T")

BROKER_AWAY = (
    TimeoutError,
    ConnectionReconnectingError,
    NoRespondersError,
    OutboundBufferLimitError,
    NoStreamResponseError,
    ServiceUnavailableError,
)
"""What an operation raises while the broker, or its JetStream, is not there."""


class Bus:
    """A connection to the broker in one role. Make it with ``Bus.connect``."""

    def __init__(self, role: Role, settings: BusSettings) -> None:
        self.role = role
        self.settings = settings
        self.nc = Client()
        self._opened = False
        self._first_failures: asyncio.Queue[Exception] = asyncio.Queue()
        self._last_failure: Exception = TimeoutError("no answer")
        self._lost_at: float | None = None
        self._connected = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    async def connect(
        cls, role: Role, settings: BusSettings | None = None, *, name: str | None = None
    ) -> Self:
        """A connection as ``role``; ``Unavailable`` when the broker does not let us in."""
        bus = cls(role, settings or BusSettings())
        await bus._open(name or role)
        return bus

    async def _open(self, name: str) -> None:
        settings, password = self.settings, self.settings.password(self.role)
        servers = settings.url.split(",")
        connecting = asyncio.ensure_future(
            self.nc.connect(
                servers,
                name=name,
                user=self.role if password else None,
                password=password,
                inbox_prefix=f"_INBOX_{self.role}",
                connect_timeout=settings.connect_timeout_s,
                reconnect_time_wait=settings.reconnect_wait_s,
                max_reconnect_attempts=-1,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
            )
        )
        # The client would try for ever; the first time, one failure per server is enough.
        failing = asyncio.ensure_future(self._failures(len(servers)))
        await asyncio.wait(
            {connecting, failing},
            timeout=settings.connect_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        failing.cancel()
        if not connecting.done() or connecting.exception() is not None:
            await self._give_up(connecting)
        self._opened = True
        self.js = self.nc.jetstream(timeout=settings.request_timeout_s)
        self._connected.set()

    async def _failures(self, count: int) -> None:
        for _ in range(count):
            self._last_failure = await self._first_failures.get()

    async def _give_up(self, connecting: "asyncio.Future[None]") -> None:
        connecting.cancel()
        await asyncio.wait({connecting})
        with contextlib.suppress(OSError, NatsError):
            await self.nc.close()
        reason = self._last_failure
        raise Unavailable(
            f"cannot connect to NATS at {_without_secrets(self.settings.url)} as {self.role!r} "
            f"({reason or type(reason).__name__}); is the broker running and the password right?"
        ) from reason

    @property
    def is_connected(self) -> bool:
        """Is the broker there right now?"""
        return bool(self.nc.is_connected)

    @property
    def is_closed(self) -> bool:
        """Has this connection been closed for good?"""
        return bool(self.nc.is_closed)

    def seconds_lost(self) -> float:
        """For how long the broker has been away; 0 while it is there."""
        return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

    async def wait_connected(self) -> None:
        """Return when the broker is there."""
        await self._connected.wait()

    def on_reconnect(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every reconnection, when subscriptions are back in place."""
        self._listeners.append(listener)

    async def ready(self) -> None:
        """Return when the broker has read all that was sent so far, subscriptions among it."""
        # A flush alone overtakes what still waits in the client's buffer.
        await self.nc._flush_pending(force_flush=True)
        await self.nc.flush()

    async def leave(self, *subscriptions: Subscription) -> None:
        """Get no more messages, and return when those that were on their way are handed over.

        The library's ``drain`` alone loses some: its round trip overtakes its own UNSUB, so that
        the broker may still send after it.
        """
        for subscription in subscriptions:
            await self.nc._send_unsubscribe(subscription._id)
        await self.ready()
        await asyncio.gather(*(subscription.drain() for subscription in subscriptions))

    async def until_done(
        self, operation: Callable[[], Awaitable[T]], *, give_up_after_s: float | None = None
    ) -> T:
        """The result of ``operation``, repeated while the broker is away.

        Only for operations that may run twice. ``Unavailable`` after ``give_up_after_s`` seconds.
        """
        deadline = None if give_up_after_s is None else time.monotonic() + give_up_after_s
        while True:
            try:
                return await operation()
            except BROKER_AWAY as error:
                log.warning("broker did not answer (%s); trying again", type(error).__name__)
            remaining = None if deadline is None else deadline - time.monotonic()
            if self.is_closed or (remaining is not None and remaining <= 0):
                raise Unavailable("the broker is away; try again when it is back")
            try:
                await asyncio.wait_for(self.wait_connected(), remaining)
            except TimeoutError:
                continue
            await asyncio.sleep(self.settings.reconnect_wait_s)

    async def close(self) -> None:
        """Send what is buffered and close; bounded, also when the broker is away."""
        if self.nc.is_closed:
            return
        if self.nc.is_connected:
            try:
                await self.nc.flush(timeout=1)
            except (NatsError, TimeoutError) as error:
                log.warning("closing without a last flush: %s", error or type(error).__name__)
        else:
            # The client would write what it has buffered into the broken socket, fail, and leave
            # its tasks behind.
            self.nc._pending.clear()
            self.nc._pending_data_size = 0
        await self.nc.close()
        self._connected.set()  # whoever waits for the broker learns that it is over

    async def _on_error(self, error: Exception) -> None:
        if not self._opened:
            self._first_failures.put_nowait(error)
            return
        # A slow subscriber loses events by design, and a lost broker has been reported already.
        if self._lost_at is None and not isinstance(error, SlowConsumerError):
            log.warning("bus: %s", str(error) or type(error).__name__)

    async def _on_disconnected(self) -> None:
        if self._opened and self._lost_at is None and not self.nc.is_closed:
            self._lost_at = time.monotonic()
            self._connected.clear()
            log.warning("lost the broker; trying to reconnect")
            # Requests that are under way will never be answered; let them know now.
            for waiting in list(self.nc._resp_map.values()):
                if not waiting.done():
                    waiting.set_exception(ConnectionReconnectingError())

    async def _on_reconnected(self) -> None:
        log.warning("the broker is back after %.1f s", self.seconds_lost())
        self._lost_at = None
        self._connected.set()
        for listener in self._listeners:
            listener()


def _without_secrets(urls: str) -> str:
    """``urls`` without the user and the password that they may carry."""
    parts = [url.rpartition("://") for url in urls.split(",")]
    return ",".join(f"{part[0] or 'nats'}://{part[2].rpartition('@')[2]}" for part in parts)
