"""One broker, three small services and as many gateways as a test asks for, behind real HTTP.

Everything runs in one thread with its own event loop, so that tests may block.
"""

import asyncio
import contextlib
import importlib.util
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import httpx2
import pytest
import uvicorn
from gesso_services.client import Gesso
from gesso_services.gateway.app import create_app
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.provision import provision
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from gesso_services.runtime.settings import JobSettings

T = TypeVar("T")
JOBS = JobSettings(ack_wait_s=5.0, fetch_expires_s=1.0, stop_grace_s=1.0)
HERE = Path(__file__).parent


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Gateway:
    """One copy of the gateway under uvicorn."""

    def __init__(self, loop: Loop, server: NatsServer, settings: GatewaySettings) -> None:
        self.loop, self.broker = loop, server
        self.app = create_app(settings, server.bus_settings())
        # asyncio turns Nagle's delay off only where the protocol is named.
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()  # who comes before the server is up waits instead of being refused
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=1)
        )
        self._serving = asyncio.run_coroutine_threadsafe(
            self._server.serve(sockets=[self.socket]), loop.loop
        )

    def when_ready(self) -> "Gateway":
        with httpx2.Client(base_url=self.url, timeout=10) as http:
            while http.get("/health/ready").status_code != 200:
                pass  # each answer takes as long as the question to the services
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._serving.result(15)
        self.socket.close()


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def load(name: str) -> ModuleType:
    """The file beside this one; tests are no package."""
    spec = importlib.util.spec_from_file_location(f"gateway_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"gateway_{name}"] = module
    spec.loader.exec_module(module)
    return module


NewSpecs = Callable[[], list[ServiceSpec]]


@pytest.fixture(scope="session")
def new_specs() -> NewSpecs:
    """Painter, coder and seer, new for every broker."""
    painter, seer = load("painter"), load("seer")
    return lambda: [painter.painter_spec(), painter.coder_spec(), seer.seer_spec()]


StartGateway = Callable[..., Gateway]


@contextlib.contextmanager
def provisioned_broker(loop: Loop, folder: Path) -> Iterator[NatsServer]:
    server = NatsServer(folder)
    server.start()

    async def prepare() -> None:
        bus = await Bus.connect("admin", server.bus_settings())
        await provision(bus, JOBS)
        await bus.close()

    loop.run(prepare())
    yield server
    server.stop()


@contextlib.contextmanager
def running_services(loop: Loop, broker: NatsServer, new_specs: NewSpecs) -> Iterator[None]:
    hosts = [
        ServiceHost(spec, bus_settings=broker.bus_settings(), job_settings=JOBS)
        for spec in new_specs()
    ]
    for host in hosts:
        loop.run(host.start(), timeout=120.0)
    yield
    for host in hosts:
        loop.run(host.stop(0.5))


@pytest.fixture(scope="session")
def shared_broker(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A provisioned broker for all tests of the edge."""
    with provisioned_broker(loop, tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def services(loop: Loop, shared_broker: NatsServer, new_specs: NewSpecs) -> Iterator[None]:
    """All three, ready."""
    with running_services(loop, shared_broker, new_specs):
        yield


@pytest.fixture(scope="session")
def start_services(loop: Loop) -> Callable[..., AbstractContextManager[Gateway]]:
    """A gateway before a broker and services of its own, ready."""

    @contextlib.contextmanager
    def start(
        folder: Path, new_specs: NewSpecs, *, wait: bool = True, **settings: Any
    ) -> Iterator[Gateway]:
        with (
            provisioned_broker(loop, folder) as broker,
            running_services(loop, broker, new_specs),
        ):
            gateway = Gateway(loop, broker, GatewaySettings(**settings))
            try:
                yield gateway.when_ready() if wait else gateway
            finally:
                gateway.stop()

    return start


@pytest.fixture
def untouched_gateway(start_services: Any, new_specs: NewSpecs, tmp_path: Path) -> Iterator[Any]:
    """Start a gateway where no test has left a job."""
    with contextlib.ExitStack() as running:
        yield lambda **settings: running.enter_context(
            start_services(tmp_path / "nats", new_specs, **settings)
        )


@pytest.fixture(scope="session")
def start_gateway(loop: Loop, shared_broker: NatsServer, services: None) -> Iterator[StartGateway]:
    """Start one more copy of the gateway with other settings."""
    running: list[Gateway] = []

    def start(**settings: Any) -> Gateway:
        gateway = Gateway(loop, shared_broker, GatewaySettings(**settings))
        running.append(gateway)
        return gateway.when_ready()

    yield start
    for gateway in running:
        gateway.stop()


@pytest.fixture(scope="session")
def server(start_gateway: StartGateway) -> Gateway:
    """The open gateway that most tests talk to."""
    return start_gateway(heartbeat_s=0.05)


# One client for all tests: each new one reads the certificates of the machine again.
@pytest.fixture(scope="session")
def http(server: Gateway) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def gesso(server: Gateway) -> Iterator[Gesso]:
    with Gesso(server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def annotator(
    start_services: Any, annotation_spec: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway before the real annotation service alone, which reads, and whose segmenter has
    random weights; on a broker of their own.
    """
    folder = tmp_path_factory.mktemp("annotation-nats")
    required = {"required_services": ("annotation",)}
    with start_services(folder, lambda: [annotation_spec(reader=True)], **required) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def start_on_annotator(annotator: Gateway) -> Iterator[StartGateway]:
    """Start one more gateway with other settings before the annotator's broker."""
    running: list[Gateway] = []

    def start(**settings: Any) -> Gateway:
        required = {"required_services": ("annotation",), **settings}
        running.append(Gateway(annotator.loop, annotator.broker, GatewaySettings(**required)))
        return running[-1].when_ready()

    yield start
    for gateway in running:
        gateway.stop()


@pytest.fixture(scope="session")
def label(annotator: Gateway) -> Iterator[httpx2.Client]:
    """A client of the annotator."""
    with httpx2.Client(base_url=annotator.url, timeout=60) as client:
        yield client
