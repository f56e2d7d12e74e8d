"""What the fabric itself costs: a job that does nothing, and a call that carries a latent.

Real parts in processes of their own: nats-server, the gateway under uvicorn, and one replica whose
job returns at once. A job is one ``POST /v1/images/generations`` on a kept connection, so its time
covers HTTP, the book of jobs, the queue, the replica, the events and the way back. The call is
``decode`` with 64 KiB of latent, what Sana draws for 1024 px, over the bus alone.

    python bench/fabric.py            → bench/results/fabric.json
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gesso_contracts import SAFETENSORS
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.provision import provision
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceContext, ServiceSpec, run_service
from gesso_services.runtime.settings import JobSettings, ServiceSettings

RESULTS = Path(__file__).parent / "results" / "fabric.json"
TARGETS = {"job_p50_ms": 15.0, "job_p99_ms": 60.0, "jobs_per_s": 150.0, "call_p50_ms": 3.0}
LATENT = bytes(64 * 1024)
PICTURE = bytes(2048)
IN_FLIGHT = 32


class Nothing:
    """A replica whose picture is always the same, ready before anybody asked."""

    async def start(self, context: ServiceContext) -> None:
        self.image = await context.blobs.put(PICTURE, "image/png")

    async def generate_image(self, request: m.GenerateImage, job: JobContext) -> m.ImageReady:
        made = m.Provenance(
            model=request.model,
            revision="none",
            weights_sha256="0" * 64,
            sampler="flow-euler",
            steps=1,
            guidance_scale=1.0,
        )
        return m.ImageReady(
            image=self.image,
            width=request.width,
            height=request.height,
            seed=request.seed,
            provenance=made,
        )

    async def decode(self, request: m.DecodeLatent) -> m.LatentDecoded:
        image = Inline(data=PICTURE, media_type="image/png")
        return m.LatentDecoded(image=image, width=64, height=64)


def diffusion_of_nothing() -> ServiceSpec:
    nothing = Nothing()
    return ServiceSpec(
        name="diffusion",
        settings=ServiceSettings.for_service("diffusion", slots=IN_FLIGHT),
        jobs={"generate-image": nothing.generate_image},
        start=nothing.start,
        models=("sana-tiny",),
    )


def autoencoder_of_nothing() -> ServiceSpec:
    return ServiceSpec(
        name="autoencoder",
        settings=ServiceSettings.for_service("autoencoder"),
        rpc={"decode": Nothing().decode},
        models=("dcae-tiny",),
    )


SPECS = {"diffusion": diffusion_of_nothing, "autoencoder": autoencoder_of_nothing}


class Connection:
    """One kept-alive HTTP connection, as light as possible: the client is not what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        kind = "Content-Type: application/json\r\n" if body else ""
        self.writer.write(f"{head}{kind}\r\n".encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        return int(answer.split()[1]), await self.reader.readexactly(length)

    async def job(self, seed: int) -> float:
        """Seconds from asking for a picture to being told where it is."""
        wish = {"prompt": "nothing", "seed": seed, "response_format": "url"}
        begun = time.perf_counter()
        status, body = await self.request(
            "POST", "/v1/images/generations", json.dumps(wish).encode()
        )
        if status != 200:
            raise SystemExit(f"the gateway answered {status}: {body.decode()}")
        return time.perf_counter() - begun


@contextlib.contextmanager
def child(*arguments: str, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


@contextlib.asynccontextmanager
async def fabric(folder: Path) -> AsyncIterator[tuple[NatsServer, int]]:
    """Broker, gateway and two replicas, all ready; the port of the gateway."""
    server = NatsServer(folder)
    server.start()
    bus = await Bus.connect("admin", server.bus_settings())
    await provision(bus, JobSettings())
    await bus.close()
    port = free_port()
    environment = {**server.environment(), "GESSO_GATEWAY_PORT": str(port)}
    environment["GESSO_LOG_LEVEL"] = "warning"
    try:
        with (
            child(__file__, "--replica", "diffusion", environment=environment),
            child(__file__, "--replica", "autoencoder", environment=environment),
            child("-m", "gesso_services.gateway.server", environment=environment),
        ):
            await until_ready(port)
            yield server, port
    finally:
        server.stop()


async def until_ready(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                status, _ = await (await Connection.open(port)).request("GET", "/health/ready")
                if status == 200:
                    return
            await asyncio.sleep(0.2)


async def job_latency(port: int, count: int) -> list[float]:
    """One job after the other."""
    connection = await Connection.open(port)
    for seed in range(20):
        await connection.job(seed)
    return [await connection.job(seed) for seed in range(count)]


async def job_throughput(port: int, count: int) -> tuple[float, list[float]]:
    """Jobs per second with ``IN_FLIGHT`` at once, and how long each took."""
    connections = [await Connection.open(port) for _ in range(IN_FLIGHT)]
    seeds = iter(range(count))

    async def keep_asking(connection: Connection) -> list[float]:
        return [await connection.job(seed) for seed in seeds]

    begun = time.perf_counter()
    times = await asyncio.gather(*(keep_asking(connection) for connection in connections))
    return count / (time.perf_counter() - begun), [t for some in times for t in some]


async def call_latency(server: NatsServer, count: int) -> list[float]:
    """One decoding after the other."""
    bus = await Bus.connect("gateway", server.bus_settings())
    latent = Inline(data=LATENT, media_type=SAFETENSORS, dtype="float16", shape=(32, 32, 32))
    message = m.DecodeLatent(model="dcae-tiny", latent=latent)
    times = []
    for _ in range(count + 20):
        begun = time.perf_counter()
        await call(bus, "autoencoder", "decode", message, m.LatentDecoded)
        times.append(time.perf_counter() - begun)
    await bus.close()
    return times[20:]


def percentiles(seconds: Sequence[float], name: str) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {
        f"{name}_p50_ms": round(1000 * statistics.median(seconds), 2),
        f"{name}_p99_ms": round(1000 * cuts[98], 2),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        async with fabric(Path(folder)) as (server, port):
            load_before = os.getloadavg()[0]
            latencies = await job_latency(port, arguments.jobs)
            cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            rate, loaded = await job_throughput(port, 4 * arguments.jobs)
            cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
            calls = await call_latency(server, 2 * arguments.jobs)
    return {
        "case": "fabric",
        "device": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        **percentiles(latencies, "job"),
        "jobs_per_s": round(rate, 1),
        "in_flight": IN_FLIGHT,
        "client_cpu_ms_per_job": round(1000 * cpu / len(loaded), 3),
        **percentiles(loaded, "loaded_job"),
        **percentiles(calls, "call"),
        "targets": TARGETS,
        "measured": date.today().isoformat(),
    }


def show(row: dict[str, Any]) -> None:
    print(f"fabric on {row['device']}, {row['cores']} cores, load {row['load_average_before']}")
    for name, target in TARGETS.items():
        print(f"  {name:14} {row[name]:8.2f}   target {target:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--replica", choices=SPECS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replica:
        asyncio.run(run_service(SPECS[arguments.replica]()))
        return
    row = asyncio.run(measure(arguments))
    show(row)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
