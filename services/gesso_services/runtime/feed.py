"""Jobs from the queue, one at a time and only when asked for.

A pull request goes out when the worker has a free slot, never before, so no job waits inside a
busy replica. After a reconnection the request is made again through a new inbox: the old one may be
deaf, and a message sent to it must not arrive next to a second one.
"""

import asyncio
import contextlib
import json
import logging
from functools import partial
from typing import Any

from gesso_contracts import subjects
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from gesso_services.runtime.connection import Bus

log = logging.getLogger(__name__)

LEAVE_S = 1.0
EXPIRED = "408"  # nothing came before the request expired


class JobFeed:
    """The pull side of the durable consumer ``service``."""

    def __init__(self, bus: Bus, service: str, *, expires_s: float) -> None:
        self.bus = bus
        self.service = service
        self.expires_s = expires_s
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{subjects.STREAM_JOBS}.{service}"
        self._request = json.dumps({"batch": 1, "expires": int(expires_s * 1e9)}).encode()
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Any = None
        self._inbox = ""
        self._stopped = False
        self._refused: str | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        bus.on_reconnect(self._renew)

    async def next(self) -> Msg | None:
        """The next job; ``None`` once the feed is stopped. Waits as long as it takes."""
        while not self._stopped:
            try:
                await self._ask()
                async with asyncio.timeout(self.expires_s + 1.0):
                    message = await self._arrived.get()
            except TimeoutError:
                self._forget_inbox()
                continue
            except NatsError as error:
                log.warning("cannot ask for jobs: %s", error or type(error).__name__)
                await asyncio.sleep(self.bus.settings.reconnect_wait_s)
                continue
            if message is None:
                continue
            status = (message.headers or {}).get("Status")
            if status is None:
                self._refused = None
                return await self._unless_stopped(message)
            if status != EXPIRED:
                await self._wait_a_little(status)
        return None

    async def stop(self) -> None:
        """Ask for no more; a job that is just arriving goes back to the queue at once."""
        self._stopped = True
        if self._subscription is not None and self.bus.is_connected:
            # Bounded: a broker that has just died does not answer, and is not missed yet.
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                async with asyncio.timeout(LEAVE_S):
                    await self.bus.leave(self._subscription)
        self._arrived.put_nowait(None)
        while not self._arrived.empty():
            message = self._arrived.get_nowait()
            if message is not None and message.reply:
                await message.nak()
        self._arrived.put_nowait(None)

    async def _wait_a_little(self, status: str) -> None:
        """The queue is not there, or not yet again."""
        if status != self._refused:
            self._refused = status
            log.warning(
                "the queue of %s gives no jobs (status %s); asking on", self.service, status
            )
        await asyncio.sleep(self.bus.settings.reconnect_wait_s)

    async def _unless_stopped(self, message: Msg) -> Msg | None:
        if not self._stopped:
            return message
        await message.nak()
        return None

    async def _ask(self) -> None:
        await self.bus.wait_connected()
        if self._subscription is None:
            self._inbox = self.bus.nc.new_inbox()
            self._subscription = await self.bus.nc.subscribe(
                self._inbox, cb=partial(self._arrive, self._inbox)
            )
        if self._arrived.empty():
            await self.bus.nc.publish(self._subject, self._request, reply=self._inbox)

    async def _arrive(self, inbox: str, message: Msg) -> None:
        if inbox == self._inbox:
            self._arrived.put_nowait(message)
        elif message.reply:
            await message.nak()  # an answer to a request that was given up

    def _renew(self) -> None:
        if not self._stopped:
            self._forget_inbox()
            self._arrived.put_nowait(None)

    def _forget_inbox(self) -> None:
        old, self._subscription, self._inbox = self._subscription, None, ""
        if old is not None:
            task = asyncio.get_running_loop().create_task(self._leave(old))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, subscription: Subscription) -> None:
        with contextlib.suppress(NatsError, TimeoutError):
            await self.bus.leave(subscription)


async def backlog(bus: Bus, service: str) -> int:
    """Jobs of ``service`` that wait or run, over all replicas."""
    info = await bus.js.consumer_info(subjects.STREAM_JOBS, service)
    return int((info.num_pending or 0) + (info.num_ack_pending or 0))
