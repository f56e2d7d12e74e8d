"""What a service is, and the host that runs one replica of it.

A ``ServiceSpec`` lists handlers and three moments of life; a ``ServiceHost`` gives it a bus, a
worker and endpoints. The same host runs under plain asyncio (``run_service``) and in Ray Serve.
"""

import asyncio
import contextlib
import logging
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from gesso_contracts import messages, operations, subjects
from gesso_contracts.base import Message
from gesso_core.errors import Unavailable
from nats.errors import Error as NatsError

from gesso_services.runtime import rpc
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.outcome import JobHandler, JobKind
from gesso_services.runtime.rpc import Endpoint, RpcHandler, RpcServer
from gesso_services.runtime.settings import ROLES, BusSettings, JobSettings, ServiceSettings
from gesso_services.runtime.worker import Worker

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Message)

ASK_AGAIN_S = 0.5
RPC_GRACE_S = 5.0


@dataclass(frozen=True)
class ServiceContext:
    """What the runtime gives to a service."""

    bus: Bus
    blobs: BlobStore
    metrics: Metrics

    async def call(
        self, service: str, verb: str, message: Message, reply: type[R], *, timeout: float = 30.0
    ) -> R:
        """Ask another service; see ``rpc.call``."""
        return await rpc.call(self.bus, service, verb, message, reply, timeout=timeout)

    def trial_job(self) -> JobContext:
        """A job context for a warm-up: nobody hears what it reports."""
        return JobContext(f"warm-up-{uuid.uuid4().hex[:12]}")


async def _nothing_to_do(_: ServiceContext) -> None:
    return None


async def _nothing_to_stop() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """One service: its name, its handlers, its settings, and how it comes and goes.

    ``rpc`` maps verbs and ``jobs`` maps kinds to handlers; the messages are those of
    ``operations`` unless ``messages`` names others as ``{verb or kind: (request, reply)}``.
    ``start`` loads; ``warm_up`` sends a real request through a real handler; ``stop`` lets go.
    """

    name: str
    settings: ServiceSettings
    rpc: Mapping[str, RpcHandler] = field(default_factory=dict)
    jobs: Mapping[str, JobHandler] = field(default_factory=dict)
    messages: Mapping[str, tuple[type[Message], type[Message]]] = field(default_factory=dict)
    start: Callable[[ServiceContext], Awaitable[None]] = _nothing_to_do
    warm_up: Callable[[ServiceContext], Awaitable[None]] = _nothing_to_do
    stop: Callable[[], Awaitable[None]] = _nothing_to_stop
    models: tuple[str, ...] = ()

    def endpoints(self) -> dict[str, Endpoint]:
        """The verbs of this service with their messages."""
        table = operations.RPC.get(self.name, {})
        return {
            verb: Endpoint(verb=verb, request=self._types(verb, table)[0], handler=handler)
            for verb, handler in self.rpc.items()
        }

    def kinds(self) -> dict[str, JobKind]:
        """The kinds of jobs of this service with their messages."""
        table = operations.JOBS.get(self.name, {})
        kinds: dict[str, JobKind] = {}
        for kind, handler in self.jobs.items():
            request, result = self._types(kind, table)
            kinds[kind] = JobKind(request=request, result=result, handler=handler)
        return kinds

    def _types(
        self, name: str, table: Mapping[str, operations.Operation]
    ) -> tuple[type[Message], type[Message]]:
        if name in self.messages:
            return self.messages[name]
        return table[name].request, table[name].reply


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

    @property
    def is_ready(self) -> bool:
        """Has a warm-up gone through, and is work being taken?"""
        return self.rpc is not None

    async def start(self) -> None:
        """Connect, load, warm up, and only then take work.

        Parts that are still missing are waited for; ``Unavailable`` after ``ready_timeout_s``.
        """
        settings, deadline = (
            self.spec.settings,
            time.monotonic() + self.spec.settings.ready_timeout_s,
        )
        role = next((role for role in ROLES if role == self.spec.name), None)
        assert role is not None, f"nats.conf has no role for {self.spec.name!r}"
        self.bus = bus = await _patiently(
            lambda: Bus.connect(role, self.bus_settings, name=f"{role}-{self.instance}"), deadline
        )
        store = await _patiently(lambda: JobStore.open(bus), deadline)
        context = ServiceContext(bus, BlobStore(bus), self.metrics)
        await self.spec.start(context)
        await _patiently(lambda: self.spec.warm_up(context), deadline)
        self.worker = Worker(
            bus,
            store,
            self.spec.name,
            self.spec.kinds(),
            slots=settings.slots,
            settings=self.job_settings,
            metrics=self.metrics,
        )
        endpoints = self.spec.endpoints() | self._own_endpoints()
        server = RpcServer(
            bus,
            self.spec.name,
            endpoints,
            concurrency=settings.rpc_concurrency,
            queue=settings.rpc_queue,
            metrics=self.metrics,
        )
        await server.start({"instance": self.instance, "models": ",".join(self.spec.models)})
        if self.spec.jobs:
            await self.worker.start()
        if settings.metrics_port is not None:
            self._metrics_server = self.metrics.listen(settings.metrics_port)
        self.rpc = server
        log.info("ready: %s", settings)

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more work, finish or give back what is there, close. Bounded in time."""
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

    def _own_endpoints(self) -> dict[str, Endpoint]:
        return {
            "ready": Endpoint(verb="ready", request=messages.AskReady, handler=self._answer_ready),
            "metrics": Endpoint(
                verb="metrics", request=messages.AskMetrics, handler=self._answer_metrics
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
        )

    async def _answer_metrics(self, _: messages.AskMetrics) -> messages.MetricsText:
        assert self.bus is not None
        with contextlib.suppress(NatsError, TimeoutError):
            info = await self.bus.js.consumer_info(subjects.STREAM_JOBS, self.spec.name)
            self.metrics.backlog((info.num_pending or 0) + (info.num_ack_pending or 0))
        return messages.MetricsText(text=self.metrics.text())


T = TypeVar("T")


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
    """Run one replica of ``spec`` in this process until SIGTERM or SIGINT."""
    host, enough = ServiceHost(spec), asyncio.Event()
    loop = asyncio.get_running_loop()
    for wish in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(wish, enough.set)
    started = asyncio.create_task(host.start())
    stopped = asyncio.create_task(enough.wait())
    await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if started.done():
            await started
            await stopped
        else:
            started.cancel()
    finally:
        await host.stop()
