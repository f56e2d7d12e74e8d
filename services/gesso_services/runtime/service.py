"""The host that runs one replica of a service: bus, endpoints, worker, readiness, a bounded end.

The same host runs under plain asyncio (``run_service``) and inside Ray Serve (``replica``).
"""

import asyncio
import contextlib
import logging
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from gesso_contracts import messages
from gesso_core.errors import Unavailable
from nats.errors import Error as NatsError

from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.feed import backlog
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.rpc import Endpoint, RpcServer
from gesso_services.runtime.settings import BusSettings, JobSettings, role_of
from gesso_services.runtime.spec import ServiceContext, ServiceSpec
from gesso_services.runtime.worker import Worker

__all__ = ["ServiceContext", "ServiceHost", "ServiceSpec", "run_service"]

log = logging.getLogger(__name__)

T = TypeVar("T")

ASK_AGAIN_S = 0.5
RPC_GRACE_S = 5.0
LOOK_EVERY_S = 5.0


class ServiceHost:
    """One replica of a service."""

    def __init__(
        self,
        spec: ServiceSpec,
        *,
        bus_settings: BusSettings | None = None,
        job_settings: JobSettings | None = None,
    ) -> None:
        self.spec = spec
        self.bus_settings = bus_settings or BusSettings()
        self.job_settings = job_settings or JobSettings()
        self.metrics = Metrics(spec.name)
        self.instance = uuid.uuid4().hex[:12]
        self.bus: Bus | None = None
        self.worker: Worker | None = None
        self.rpc: RpcServer | None = None
        self._metrics_server: WSGIServer | None = None
        self._stopped = False

    @property
    def is_ready(self) -> bool:
        """Has a warm-up gone through, and is work being taken?"""
        return self.rpc is not None

    async def start(self) -> None:
        """Connect, load, warm up, and only then take work.

        Parts that are still missing are waited for; ``Unavailable`` after ``ready_timeout_s``.
        """
        settings = self.spec.settings
        deadline = time.monotonic() + settings.ready_timeout_s
        self.bus = bus = await _patiently(self._connect, deadline)
        store = await _patiently(lambda: JobStore.open(bus), deadline)
        context = ServiceContext(bus, BlobStore(bus), self.metrics)
        await self.spec.start(context)
        await _patiently(lambda: self.spec.warm_up(context), deadline)
        self.worker = self._new_worker(bus, store)
        server = self._new_server(bus)
        await server.start({"instance": self.instance, "models": ",".join(self.spec.models)})
        if self.spec.jobs:
            await self.worker.start()
        if settings.metrics_port is not None:
            self._metrics_server = self.metrics.listen(settings.metrics_port)
        self.rpc = server
        log.info("ready: %s", settings)

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more work, finish or give back what is there, close. Bounded in time."""
        if self._stopped:
            return
        self._stopped = True
        grace = self.job_settings.stop_grace_s if grace_s is None else grace_s
        server, self.rpc = self.rpc, None
        stopping = [server.stop(min(grace, RPC_GRACE_S))] if server else []
        if self.worker is not None:
            stopping.append(self.worker.stop(grace))
        await asyncio.gather(*stopping)
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        await self.spec.stop()
        if self.bus is not None:
            await self.bus.close()
        log.info("stopped")

    def check_health(self) -> None:
        """``Unavailable`` when this replica should be replaced."""
        if self.bus is None or self.bus.is_closed:
            raise Unavailable("the connection to the broker is closed")
        if self.bus.seconds_lost() > self.spec.settings.broker_lost_s:
            raise Unavailable(f"the broker has been away for {self.bus.seconds_lost():.0f} s")
        if self.is_ready and self.spec.jobs and self.worker and not self.worker.is_healthy:
            raise Unavailable("the worker has died")

    def load(self) -> dict[str, float]:
        """What this replica is busy with, for the autoscaler."""
        calls = self.rpc.in_flight if self.rpc else 0
        return {"calls": float(calls), "jobs": float(self.worker.running if self.worker else 0)}

    async def _connect(self) -> Bus:
        role = role_of(self.spec.name)
        return await Bus.connect(role, self.bus_settings, name=f"{role}-{self.instance}")

    def _new_worker(self, bus: Bus, store: JobStore) -> Worker:
        return Worker(
            bus,
            store,
            self.spec.name,
            self.spec.kinds(),
            slots=self.spec.settings.slots,
            settings=self.job_settings,
            metrics=self.metrics,
        )

    def _new_server(self, bus: Bus) -> RpcServer:
        return RpcServer(
            bus,
            self.spec.name,
            self.spec.endpoints() | self._own_endpoints(),
            concurrency=self.spec.settings.rpc_concurrency,
            queue=self.spec.settings.rpc_queue,
            metrics=self.metrics,
        )

    def _own_endpoints(self) -> dict[str, Endpoint]:
        return {
            "ready": Endpoint(
                verb="ready",
                request=messages.AskReady,
                handler=self._answer_ready,
                urgent=True,
            ),
            "metrics": Endpoint(
                verb="metrics",
                request=messages.AskMetrics,
                handler=self._answer_metrics,
                urgent=True,
            ),
        }

    async def _answer_ready(self, _: messages.AskReady) -> messages.ServiceReady:
        return messages.ServiceReady(
            service=self.spec.name,
            instance=self.instance,
            ready=self.is_ready,
            models=list(self.spec.models),
            slots=self.spec.settings.slots,
            running=self.worker.running if self.worker else 0,
            in_use=dict(self.spec.in_use()),
            missing=dict(self.spec.missing()),
        )

    async def _answer_metrics(self, _: messages.AskMetrics) -> messages.MetricsText:
        assert self.bus is not None
        with contextlib.suppress(NatsError, TimeoutError):
            self.metrics.backlog(await backlog(self.bus, self.spec.name))
        return messages.MetricsText(text=self.metrics.text())


async def _patiently(attempt: Callable[[], Awaitable[T]], deadline: float) -> T:
    """The result of ``attempt``, tried again while a part of the system is not there yet."""
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("not ready yet: %s", error)
            await asyncio.sleep(ASK_AGAIN_S)


async def run_service(spec: ServiceSpec) -> None:
    """Run one replica of ``spec`` in this process until SIGTERM or SIGINT.

    ``Unavailable`` when it is no longer healthy, so that whoever started it can start it again.
    """
    host, enough = ServiceHost(spec), asyncio.Event()
    loop = asyncio.get_running_loop()
    for wish in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(wish, enough.set)
    living = asyncio.create_task(_live(host))
    stopped = asyncio.create_task(enough.wait())
    try:
        await asyncio.wait({living, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if living.done():
            await living
    finally:
        stopped.cancel()
        living.cancel()
        await host.stop()


async def _live(host: ServiceHost) -> None:
    await host.start()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        host.check_health()
