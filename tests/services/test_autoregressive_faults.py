"""What goes wrong with one picture or answer stays with it: cancelled, too large, killed."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gesso_contracts import conversations as c
from gesso_contracts import messages as m
from gesso_contracts.jobs import JobProgress, JobState, JobText
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.pictures import Pixels, decode_picture
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_chat import Chat
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.service import ServiceHost, ServiceSpec

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]
PIPELINES = {"scales": HartPipeline, "seer": VilaUPipeline}
STEPS_TO_PROGRESS = {"scales": 1, "seer": 2}  # the first step of a VILA-U feeds the prompt


class Gate:
    """Lets steps through one by one, or all of them."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.is_open = False

    def pass_through(self) -> None:
        if not self.is_open:
            assert self.steps.acquire(timeout=20)

    def open(self) -> None:
        self.is_open = True
        self.steps.release(1000)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Gate]]:
    """A closed gate before every step of both families; opened when the test is over."""
    gates = {name: Gate() for name in PIPELINES}
    for name, kind in PIPELINES.items():
        monkeypatch.setattr(kind, "advance", gated(kind.advance, gates[name]))
    yield gates
    for gate in gates.values():
        gate.open()


def gated(advance: Any, gate: Gate) -> Callable[[Any, Sequence[Any]], list[Any]]:
    def slowly(pipeline: Any, drafts: Sequence[Any]) -> list[Any]:
        gate.pass_through()
        moved: list[Any] = advance(pipeline, drafts)
        return moved

    return slowly


def wish(model: str, **changes: object) -> m.GenerateImage:
    plain = {"model": model, "prompt": "a red apple", "width": 64, "height": 64, "seed": 7}
    return m.GenerateImage(**(plain | changes))


def question(words: str, **options: object) -> c.AnswerTurn:
    turns = [c.Turn(role="user", parts=[c.TextPart(text=words)])]
    return c.AnswerTurn(**({"model": "seer", "turns": turns, "max_tokens": 16} | options))


async def submit(store: JobStore, request: m.GenerateImage | c.AnswerTurn, **named: str) -> str:
    kind = "answer" if isinstance(request, c.AnswerTurn) else "generate-image"
    state, _ = await store.submit("autoregressive", kind, request, **named)
    return state.id


async def pixels_of(state: JobState, bus: Bus) -> Pixels:
    assert state.status == "succeeded", state.problem
    ready = m.ImageReady.model_validate(state.result)
    return decode_picture(await BlobStore(bus).get(ready.image))


@pytest.mark.parametrize("model", PIPELINES)
async def test_a_picture_is_cancelled_between_steps_and_its_place_is_free(
    token_services: ServiceHost, token_store: JobStore, gates: dict[str, Gate], model: str
) -> None:
    async with follow(token_store, f"long-{model}", new=True) as events:
        await submit(token_store, wish(model), job_id=f"long-{model}")
        gates[model].steps.release(STEPS_TO_PROGRESS[model])
        async for event in events:
            if isinstance(event, JobProgress):
                await token_store.cancel(f"long-{model}")
                await asyncio.sleep(0.1)  # the replica hears it while the next step waits
                gates[model].steps.release()
                break
        last = [event async for event in events][-1]
    assert last.state.status == "cancelled"
    assert last.state.step <= 2
    gates[model].open()
    job_id = await submit(token_store, wish(model))
    assert (await wait_for(token_store, job_id, 20)).status == "succeeded"
    assert room_of(token_services).used == 0


async def test_an_answer_is_cancelled_between_words(
    token_services: ServiceHost, token_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(Chat, "advance", gated(Chat.advance, gate))
    async with follow(token_store, "talk", new=True) as events:
        await submit(token_store, question("hello", max_tokens=64), job_id="talk")
        gate.steps.release(2)  # the conversation is fed, then the first words come
        async for event in events:
            if isinstance(event, JobText):
                await token_store.cancel("talk")
                await asyncio.sleep(0.1)
                gate.steps.release()
                break
        last = [event async for event in events][-1]
    assert last.state.status == "cancelled"
    assert 0 < last.state.step <= 8
    gate.open()
    assert room_of(token_services).used == 0


def room_of(host: ServiceHost) -> Any:
    return host.spec.start.__self__.workshop.room  # type: ignore[attr-defined]


async def test_drawings_wait_for_room_and_one_that_waits_can_be_cancelled(
    start_service: Start,
    autoencoder_spec: ServiceSpec,
    autoregressive_spec: Callable[..., ServiceSpec],
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await start_service(autoencoder_spec)
    roomy = await start_service(autoregressive_spec())
    needs: list[int] = []
    reserved = room_of(roomy).reserved

    def noted(need: int, *args: Any, **named: Any) -> Any:
        needs.append(need)
        return reserved(need, *args, **named)

    monkeypatch.setattr(room_of(roomy), "reserved", noted)
    job_id = await submit(store, wish("scales"))
    assert (await wait_for(store, job_id, 20)).status == "succeeded"
    await roomy.stop(0.2)

    gate = Gate()
    tight = await start_service(autoregressive_spec(kv_cache_bytes=int(2.5 * needs[0])))
    monkeypatch.setattr(HartPipeline, "advance", gated(HartPipeline.advance, gate))
    ids = [await submit(store, wish("scales", seed=seed)) for seed in range(5)]
    while room_of(tight).waiting < 3:
        await asyncio.sleep(0.02)
    assert room_of(tight).used == 2 * needs[0]
    await store.cancel(ids[2])
    assert (await wait_for(store, ids[2], 10)).status == "cancelled"
    gate.open()
    states = [await wait_for(store, job_id, 20) for job_id in ids]
    assert [state.status for state in states].count("succeeded") == 4
    assert (room_of(tight).used, room_of(tight).waiting) == (0, 0)


async def test_what_is_larger_than_the_whole_room_is_refused_and_the_rest_goes_on(
    start_service: Start,
    autoencoder_spec: ServiceSpec,
    autoregressive_spec: Callable[..., ServiceSpec],
    store: JobStore,
) -> None:
    await start_service(autoencoder_spec)
    host = await start_service(autoregressive_spec())
    room_of(host).capacity = 60_000
    large = await submit(store, question("pear " * 60, max_tokens=100))
    small = await submit(store, question("hello", max_tokens=2))
    state = await wait_for(store, large, 20)
    assert state.problem is not None
    assert state.problem.code == "out_of_memory"
    assert "GESSO_AUTOREGRESSIVE_KV_CACHE_BYTES of at least" in state.problem.detail
    assert (await wait_for(store, small, 20)).status == "succeeded"


@pytest.mark.parametrize("model", PIPELINES)
async def test_one_that_fits_into_no_memory_does_not_take_the_others_along(
    token_services: ServiceHost, token_store: JobStore, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    kind = PIPELINES[model]
    advance = kind.advance

    def greedy(pipeline: Any, drafts: Sequence[Any]) -> list[Any]:
        if any(draft.recipe.seed == 3 for draft in drafts):
            raise torch.OutOfMemoryError("no room")
        return advance(pipeline, drafts)

    monkeypatch.setattr(kind, "advance", greedy)
    ids = [await submit(token_store, wish(model, seed=seed)) for seed in range(6)]
    states = [await wait_for(token_store, job_id, 20) for job_id in ids]
    assert [state.status for state in states].count("succeeded") == 5
    problem = states[3].problem
    assert problem is not None
    assert problem.code == "out_of_memory"
    assert "smaller" in problem.detail


async def test_numbers_that_are_none_fail_that_picture_with_advice(
    token_services: ServiceHost, token_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    advance = VilaUPipeline.advance

    def broken(pipeline: Any, drafts: Sequence[Any]) -> list[Any]:
        moved = advance(pipeline, drafts)
        return [replace(d, finite=d.recipe.seed != 1) for d in moved]

    monkeypatch.setattr(VilaUPipeline, "advance", broken)
    ids = [await submit(token_store, wish("seer", seed=seed)) for seed in range(3)]
    states = [await wait_for(token_store, job_id, 20) for job_id in ids]
    assert [state.status for state in states] == ["succeeded", "failed", "succeeded"]
    assert states[1].problem is not None
    assert states[1].problem.code == "not_finite"


@pytest.mark.slow
async def test_two_hundred_jobs_of_every_kind_all_come_out_and_leave_nothing_behind(
    token_services: ServiceHost, token_store: JobStore
) -> None:
    def job(index: int) -> m.GenerateImage | c.AnswerTurn:
        if index % 3 == 2:
            return question(f"pear {index} " * (1 + index % 5), seed=index, temperature=1.0)
        return wish(("scales", "seer")[index % 2], seed=index, guidance_scale=1.0 + index % 4)

    ids = [await submit(token_store, job(index)) for index in range(200)]
    states = [await wait_for(token_store, job_id, 120) for job_id in ids]
    assert {state.status for state in states} == {"succeeded"}
    assert (room_of(token_services).used, room_of(token_services).waiting) == (0, 0)


@pytest.mark.slow
async def test_work_of_a_killed_replica_comes_out_the_same_from_another(
    start_service: Start,
    autoencoder_spec: ServiceSpec,
    broker: NatsServer,
    store: JobStore,
    gateway: Bus,
    autoregressive_spec: Callable[..., ServiceSpec],
    tiny_hart: Path,
    tiny_vila_u: Path,
) -> None:
    await start_service(autoencoder_spec)
    requests = [wish(("seer", "scales")[i % 2], seed=i) for i in range(40)]
    requests += [question(f"hello {i}", temperature=1.0, seed=i, max_tokens=40) for i in range(8)]
    folders = {"scales": str(tiny_hart), "seer": str(tiny_vila_u)}
    environment = {
        **os.environ,
        **broker.environment(),
        "GESSO_JOB_ACK_WAIT_S": "1",
        "GESSO_JOB_FETCH_EXPIRES_S": "1",
        "GESSO_AUTOREGRESSIVE_MODELS": "[]",
        "GESSO_AUTOREGRESSIVE_FOLDERS": json.dumps(folders),
        "GESSO_AUTOREGRESSIVE_SLOTS": "48",
    }
    command = [sys.executable, "-m", "gesso_services.cli.main", "serve", "autoregressive"]
    victim = subprocess.Popen(command, env=environment)
    try:
        ids = [await submit(store, request, job_id=f"j{i}") for i, request in enumerate(requests)]
        while not [i for i in ids if (await store.get(i)).status == "running"]:
            await asyncio.sleep(0.005)
    finally:
        victim.kill()
        victim.wait()
    await start_service(autoregressive_spec())
    states = [await wait_for(store, job_id, 60) for job_id in ids]
    assert {state.status for state in states} == {"succeeded"}
    assert max(state.attempt for state in states) == 2
    again = [await wait_for(store, await submit(store, request), 60) for request in requests]
    for request, one, other in zip(requests, states, again, strict=True):
        if isinstance(request, c.AnswerTurn):
            assert one.result == other.result
        else:
            difference = (await pixels_of(one, gateway)).astype(int) - await pixels_of(
                other, gateway
            )
            assert np.abs(difference).max() <= 1
