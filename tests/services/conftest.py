"""A real broker for every test that asks for one, with the shipped nats.conf and short times."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from gesso_services import autoencoder
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.provision import provision
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from gesso_services.runtime.settings import JobSettings, Role

TOY_FILE = Path(__file__).with_name("toy_service.py")
TINY_FILE = Path(__file__).with_name("tiny_models.py")

# Short enough for tests; the variables reach workers that run as processes of their own.
SHORT_TIMES = {
    "ack_wait_s": 1.0,
    "retry_delay_s": 0.1,
    "fetch_expires_s": 1.0,
    "stop_grace_s": 1.0,
    "save_progress_every_s": 0.0,
}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def job_settings() -> JobSettings:
    return JobSettings(**SHORT_TIMES)


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A running nats-server on free ports, with random passwords and nothing in it."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def connect(nats_server: NatsServer) -> AsyncIterator[Callable[[Role], Awaitable[Bus]]]:
    """Connect to the broker in a role; closed when the test is over."""
    async with AsyncExitStack() as opened:

        async def open_bus(role: Role) -> Bus:
            bus = await Bus.connect(role, nats_server.bus_settings())
            opened.push_async_callback(bus.close)
            return bus

        yield open_bus


@pytest.fixture
async def broker(
    nats_server: NatsServer,
    connect: Callable[[Role], Awaitable[Bus]],
    job_settings: JobSettings,
) -> NatsServer:
    """A broker with streams, buckets and consumers in place."""
    await provision(await connect("admin"), job_settings)
    return nats_server


@pytest.fixture
async def gateway(broker: NatsServer, connect: Callable[[Role], Awaitable[Bus]]) -> Bus:
    """The bus as the gateway sees it."""
    return await connect("gateway")


@pytest.fixture
async def store(gateway: Bus) -> JobStore:
    """The book of jobs as the gateway sees it."""
    return await JobStore.open(gateway)


@pytest.fixture
def toy() -> ModuleType:
    """The toy service: a diffusion service that adds numbers, one per step."""
    return module_of(TOY_FILE)


@pytest.fixture
async def start_service(
    broker: NatsServer, job_settings: JobSettings
) -> AsyncIterator[Callable[[ServiceSpec], Awaitable[ServiceHost]]]:
    """Start a replica of a service in this process; stopped when the test is over."""
    async with AsyncExitStack() as running:

        async def start(spec: ServiceSpec) -> ServiceHost:
            host = ServiceHost(spec, bus_settings=broker.bus_settings(), job_settings=job_settings)
            running.push_async_callback(host.stop, 0.2)
            await host.start()
            return host

        yield start


@pytest.fixture(scope="session")
def tiny_vila_u(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VILA-U of random weights: 64 px, four rows, videos of two frames."""
    folder: Path = module_of(TINY_FILE).write_vila_u(tmp_path_factory.mktemp("vila-u") / "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_hart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a HART of random weights: 64 px, four scales, with a decoder."""
    folder: Path = module_of(TINY_FILE).write_hart(tmp_path_factory.mktemp("hart") / "tiny")
    return folder


@pytest.fixture(scope="session")
def new_autoencoder(
    tiny_pipeline: Path, tiny_hart: Path, tiny_vila_u: Path
) -> Callable[[], ServiceSpec]:
    """The autoencoder service with what the small models' latents are decoded by."""

    def build() -> ServiceSpec:
        folders = {"tiny": tiny_pipeline, "scales": tiny_hart, "seer": tiny_vila_u}
        settings = autoencoder.AutoencoderSettings.for_service(
            "autoencoder", models=(), folders=folders
        )
        return autoencoder.build_service(settings)

    return build


@pytest.fixture
def autoencoder_spec(new_autoencoder: Callable[[], ServiceSpec]) -> ServiceSpec:
    """One such service, not started."""
    return new_autoencoder()


@pytest.fixture(scope="session")
def autoregressive_spec(tiny_hart: Path, tiny_vila_u: Path) -> Callable[..., ServiceSpec]:
    """The autoregressive service with a HART named ``scales`` and a VILA-U named ``seer``."""

    from gesso_services import autoregressive

    def build(**options: object) -> ServiceSpec:
        given = {"models": (), "folders": {"scales": tiny_hart, "seer": tiny_vila_u}, **options}
        settings = autoregressive.AutoregressiveSettings.for_service("autoregressive", **given)
        return autoregressive.build_service(settings)

    return build


@pytest.fixture(scope="session")
def tiny_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Segment Anything model of random weights."""
    from small_segmenter import write_segmenter

    return write_segmenter(tmp_path_factory.mktemp("sam") / "sam-tiny")


@pytest.fixture(scope="session")
def annotation_spec(tiny_sam: Path) -> Callable[..., ServiceSpec]:
    """The annotation service on that segmenter, which it calls ``sam-mobile``, without a reader."""
    from gesso_services import annotation

    def build(**options: object) -> ServiceSpec:
        given = {"folder": tiny_sam, "reader": False, **options}
        settings = annotation.AnnotationSettings.for_service("annotation", **given)
        return annotation.build_service(settings)

    return build


@dataclass(frozen=True)
class TokenStack:
    """The two services behind a broker of their own: a replica, the book of jobs, and the bus as
    the gateway sees it.
    """

    host: ServiceHost
    store: JobStore
    bus: Bus


@pytest.fixture(scope="module")
async def token_stack(
    tmp_path_factory: pytest.TempPathFactory,
    new_autoencoder: Callable[[], ServiceSpec],
    autoregressive_spec: Callable[..., ServiceSpec],
) -> AsyncIterator[TokenStack]:
    """Started once for all tests of a file that leave it as it was."""
    server, times = NatsServer(tmp_path_factory.mktemp("nats")), JobSettings(**SHORT_TIMES)
    server.start()
    async with AsyncExitStack() as running:
        running.callback(server.stop)
        admin = await Bus.connect("admin", server.bus_settings())
        running.push_async_callback(admin.close)
        await provision(admin, times)
        for spec in (new_autoencoder(), autoregressive_spec()):
            host = ServiceHost(spec, bus_settings=server.bus_settings(), job_settings=times)
            running.push_async_callback(host.stop, 0.2)
            await host.start()
        bus = await Bus.connect("gateway", server.bus_settings())
        running.push_async_callback(bus.close)
        yield TokenStack(host, await JobStore.open(bus), bus)


@pytest.fixture(scope="module")
def token_services(token_stack: TokenStack) -> ServiceHost:
    """The replica of the autoregressive service."""
    return token_stack.host


@pytest.fixture(scope="module")
def token_store(token_stack: TokenStack) -> JobStore:
    """The book of its jobs."""
    return token_stack.store


@pytest.fixture(scope="module")
def token_bus(token_stack: TokenStack) -> Bus:
    """Its bus as the gateway sees it."""
    return token_stack.bus


def module_of(file: Path) -> ModuleType:
    """A helper beside the tests, as a module."""
    if file.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    return sys.modules[file.stem]


@pytest.fixture
async def start_toy(
    broker: NatsServer, toy: ModuleType, job_settings: JobSettings
) -> AsyncIterator[Callable[..., Awaitable[ServiceHost]]]:
    """Start a replica of the toy service in this process; stopped when the test is over."""
    async with AsyncExitStack() as running:

        async def start(**settings: object) -> ServiceHost:
            host = ServiceHost(
                toy.build_service(**settings),
                bus_settings=broker.bus_settings(),
                job_settings=job_settings,
            )
            await host.start()
            running.push_async_callback(host.stop, 0.2)
            return host

        yield start


@pytest.fixture
def start_toy_process(
    broker: NatsServer,
) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """Start a replica of the toy service as a process that can be killed."""
    children: list[subprocess.Popen[bytes]] = []
    times = {f"GESSO_JOB_{key.upper()}": str(value) for key, value in SHORT_TIMES.items()}

    def start() -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **broker.environment(), **times}
        child = subprocess.Popen([sys.executable, str(TOY_FILE)], env=environment)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
