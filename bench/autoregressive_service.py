"""Eight requests at once to one service, against the same eight one by one.

Real parts in processes of their own: nats-server, one replica of the autoregressive service and one
of the autoencoder service, each with one thread for its steps. Requests differ in prompt, seed and
strength of guidance; a job's time covers the queue, the steps, decoding, the blob and the way back.
Blocks of eight alternate between the two ways. The texts were encoded before, in the first,
unmeasured round, as they are when a prompt is asked for again with another seed.
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from cpu_timing import Row
from gesso_contracts import conversations as c
from gesso_contracts import messages as m
from gesso_contracts.base import Message
from gesso_contracts.blobs import Inline
from gesso_contracts.jobs import JobState
from gesso_core.errors import GessoError
from gesso_core.hub import resolve
from gesso_core.pipelines.pictures import encode_picture
from gesso_core.train.captions import MAIN, with_article
from gesso_core.train.compose import COLORS, composite, palette_colors, shrink, sprites_to_float
from gesso_core.train.sprites import STYLES
from gesso_services import autoencoder, autoregressive
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.provision import provision
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import run_service
from gesso_services.runtime.settings import JobSettings
from safetensors.torch import load_file

TARGET = 3.0
SERVICE, TOGETHER, SIDE = "autoregressive", 8, 64
REPLICAS = ("autoencoder", SERVICE)
READY_WITHIN_S = 240.0
LISTS = ("which background colors can you draw?", "Which colors do you know?")
QUESTIONS = (
    "what is it?",
    "describe the picture",
    "which color is the background?",
    "which style is it?",
)

Ask = tuple[str, Message]  # kind of job and what it asks for


@dataclass(frozen=True)
class Served:
    """Registry names, or folders, of the models that are served."""

    hart: str | Path
    vila_u: str | Path

    @property
    def names(self) -> tuple[str, str]:
        return _name(self.hart), _name(self.vila_u)

    def environment(self) -> dict[str, str]:
        """What tells the replicas which models to load."""
        given = (self.hart, self.vila_u)
        folders = {_name(one): str(one) for one in given if isinstance(one, Path)}
        tower = {name: path for name, path in folders.items() if name == _name(self.vila_u)}
        names = [one for one in given if isinstance(one, str)]
        towers = [] if tower else [f"{self.vila_u}-tower"]
        return {
            "GESSO_AUTOREGRESSIVE_MODELS": json.dumps(names),
            "GESSO_AUTOREGRESSIVE_FOLDERS": json.dumps(folders),
            "GESSO_AUTOENCODER_MODELS": json.dumps(["dcae-tiny", *towers]),
            "GESSO_AUTOENCODER_FOLDERS": json.dumps(tower),
            "GESSO_LOG_LEVEL": "warning",
            "OMP_NUM_THREADS": "1",
        }


def throughput(served: Served, *, smoke: bool) -> Iterator[Row]:
    """One row per kind of work."""
    yield from asyncio.run(_measure(served, repeats=1 if smoke else 12))


def replica(service: str) -> None:
    """Run one service in this process until it is told to stop."""
    build = {"autoencoder": autoencoder, SERVICE: autoregressive}[service].build_service
    asyncio.run(run_service(build()))


async def _measure(served: Served, repeats: int) -> list[Row]:
    hart, vila_u = served.names
    work = {
        f"pictures, {hart}": [_drawing(hart, i) for i in range(TOGETHER)],
        f"pictures, {vila_u}": [_drawing(vila_u, i) for i in range(TOGETHER)],
        f"answers about a picture, {vila_u}": [_answer(vila_u, i) for i in range(TOGETHER)],
        f"long answers, {vila_u}": [_long_answer(vila_u, i) for i in range(TOGETHER)],
    }
    with tempfile.TemporaryDirectory() as folder:
        async with _services(Path(folder), served.environment()) as (store, processes):
            return [
                await _compared(what, asks, store, processes, repeats)
                for what, asks in work.items()
            ]


async def _compared(
    what: str,
    asks: Sequence[Ask],
    store: JobStore,
    processes: Sequence[psutil.Process],
    repeats: int,
) -> Row:
    ways: dict[str, Callable[[], Awaitable[list[JobState]]]] = {
        "one by one": lambda: _one_by_one(store, asks),
        "together": lambda: _together(store, asks),
    }
    taken: dict[str, list[list[float]]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            before, begun = _cpu_s(processes), time.perf_counter()
            await way()
            wall, after = time.perf_counter() - begun, _cpu_s(processes)
            if number:
                spent = [b - a for a, b in zip(before, after, strict=True)]
                taken[name].append([wall, *spent])
    row: Row = {"what": what, "requests": len(asks)}
    answers = [state.result for state in await _together(store, asks)]
    tokens = [answer["answer_tokens"] for answer in answers if "answer_tokens" in (answer or {})]
    row |= {"mean_tokens": sum(tokens) / len(tokens)} if tokens else {}
    for name, times in taken.items():
        wall, *spent = (statistics.median(column) for column in zip(*times, strict=True))
        row[name] = {
            "requests_per_s": round(len(asks) / wall, 2),
            "wall_ms_per_request": round(1e3 * wall / len(asks), 2),
            "cpu_ms_per_request": {
                service: round(1e3 * seconds / len(asks), 2)
                for service, seconds in zip(REPLICAS, spent, strict=True)
            },
        }
    ratio = row["together"]["requests_per_s"] / row["one by one"]["requests_per_s"]
    return {**row, "ratio": round(ratio, 2), "target": TARGET, "met": ratio >= TARGET}


async def _one_by_one(store: JobStore, asks: Sequence[Ask]) -> list[JobState]:
    return [await _done(store, ask) for ask in asks]


async def _together(store: JobStore, asks: Sequence[Ask]) -> list[JobState]:
    return await asyncio.gather(*(_done(store, ask) for ask in asks))


async def _done(store: JobStore, ask: Ask) -> JobState:
    kind, request = ask
    state, _ = await store.submit(SERVICE, kind, request)
    final = await wait_for(store, state.id, 120.0)
    if final.status != "succeeded":
        raise SystemExit(f"a job ended as {final.status}: {final.problem}")
    return final


def _drawing(model: str, number: int) -> Ask:
    things = ("red apple", "cat", "car", "green pear", "house", "star", "dog", "yellow lemon")
    prompt = MAIN.format(
        thing=with_article(things[number % len(things)]),
        style=STYLES[number % 2],
        color=COLORS[1 + number % (len(COLORS) - 1)],
    )
    request = m.GenerateImage(
        model=model, prompt=prompt, width=SIDE, height=SIDE, seed=number,
        guidance_scale=2.0 + number % 3,
    )  # fmt: skip
    return "generate-image", request


def _answer(model: str, number: int) -> Ask:
    image = Inline(data=_sprite(37 * number), media_type="image/png")
    parts: list[c.Part] = [
        c.ImagePart(image=image),
        c.TextPart(text=QUESTIONS[number % len(QUESTIONS)]),
    ]
    turns = [c.Turn(role="user", parts=parts)]
    return "answer", c.AnswerTurn(model=model, turns=turns, max_tokens=32)


def _long_answer(model: str, number: int) -> Ask:
    """Words about words: what is listed is longer than the question."""
    parts: list[c.Part] = [c.TextPart(text=LISTS[number % len(LISTS)])]
    turns = [c.Turn(role="user", parts=parts)]
    return "answer", c.AnswerTurn(model=model, turns=turns, max_tokens=64)


def _sprite(number: int) -> bytes:
    """A picture of a sprite on a color, as PNG."""
    sprites = load_file(resolve("dcae-tiny") / "held_out_sprites.safetensors")["pixels"]
    pixels = sprites_to_float(sprites[number % len(sprites)][None])
    colors = palette_colors(torch.tensor([number % len(COLORS)]))
    picture = shrink(composite(pixels, colors), SIDE)[0]
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return encode_picture(levels.permute(1, 2, 0).numpy())


@contextlib.asynccontextmanager
async def _services(
    folder: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[JobStore, list[psutil.Process]]]:
    """Broker and both replicas, ready; the book of jobs and the replicas' processes."""
    server = NatsServer(folder)
    server.start()
    try:
        admin = await Bus.connect("admin", server.bus_settings())
        await provision(admin, JobSettings())
        await admin.close()
        with contextlib.ExitStack() as running:
            whole = {**os.environ, **server.environment(), **environment}
            processes = [running.enter_context(_child(name, whole)) for name in REPLICAS]
            bus = await Bus.connect("gateway", server.bus_settings())
            try:
                await _until_ready(bus)
                yield await JobStore.open(bus), [psutil.Process(p.pid) for p in processes]
            finally:
                await bus.close()
    finally:
        server.stop()


@contextlib.contextmanager
def _child(service: str, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    script = Path(__file__).with_name("autoregressive.py")
    command = [sys.executable, str(script), "--replica", service]
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def _until_ready(bus: Bus) -> None:
    async with asyncio.timeout(READY_WITHIN_S):
        for service in REPLICAS:
            while True:
                with contextlib.suppress(GessoError):
                    if (await call(bus, service, "ready", m.AskReady(), m.ServiceReady)).ready:
                        break
                await asyncio.sleep(0.3)


def _cpu_s(processes: Sequence[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


def _name(model: str | Path) -> str:
    return model.name if isinstance(model, Path) else model
