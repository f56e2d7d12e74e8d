"""Annotation while things go wrong: withdrawn, killed, and clicks that must not wait."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gesso_contracts import annotations as a
from gesso_contracts.blobs import Inline
from gesso_contracts.jobs import JobProgress
from gesso_core.annotate.char_sam.pipeline import CharSam
from gesso_core.pipelines.pictures import encode_picture
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost, ServiceSpec

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]
Build = Callable[..., ServiceSpec]


def picture(seed: int = 0) -> Inline:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Inline(data=encode_picture(pixels), media_type="image/png")


def words(count: int, seed: int = 0) -> a.AnnotateText:
    polygon = [(4, 4), (60, 4), (60, 40), (4, 40)]
    word = a.WordSpec(text="ab", polygon=polygon)
    return a.AnnotateText(model="char-sam", image=picture(seed), words=[word] * count)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Lets as many words through as it is released; wide open when the test is over."""
    gate, annotate = threading.Semaphore(1), CharSam.annotate  # one word is the warm-up's

    def waiting(*args: Any, **named: Any) -> Any:
        assert gate.acquire(timeout=30)
        return annotate(*args, **named)

    monkeypatch.setattr(CharSam, "annotate", waiting)
    yield gate
    gate.release(1000)


async def test_a_job_is_cancelled_between_words_and_the_next_one_is_done(
    start_service: Start, annotation_spec: Build, store: JobStore, gate: threading.Semaphore
) -> None:
    await start_service(annotation_spec())
    async with follow(store, "long", new=True) as events:
        await store.submit("annotation", "annotate-text", words(50), job_id="long")
        gate.release(2)
        async for event in events:
            if isinstance(event, JobProgress) and event.step == 2:
                await store.cancel("long")
                await asyncio.sleep(0.1)  # the replica hears it while the next word waits
                gate.release()
                break
        last = [event async for event in events][-1]
    assert last.state.status == "cancelled"
    assert last.state.step == 3
    gate.release(10)
    state, _ = await store.submit("annotation", "annotate-text", words(1))
    assert (await wait_for(store, state.id, 20)).status == "succeeded"


async def test_a_click_is_answered_while_a_word_takes_its_time(
    start_service: Start,
    annotation_spec: Build,
    store: JobStore,
    gateway: Bus,
    gate: threading.Semaphore,
) -> None:
    await start_service(annotation_spec())
    state, _ = await store.submit("annotation", "annotate-text", words(1))
    while (await store.get(state.id)).status != "running":
        await asyncio.sleep(0.02)
    click = a.PromptSpec(points=[(20, 20)], labels=[1])
    request = a.SegmentPrompts(model="sam-mobile", image=picture(), prompts=[click])
    answer = await call(gateway, "annotation", "segment", request, a.Segmented)
    assert len(answer.masks) == 1
    assert (await store.get(state.id)).status == "running"
    gate.release()
    assert (await wait_for(store, state.id, 20)).status == "succeeded"


async def test_one_bad_picture_fails_and_the_others_are_done(
    start_service: Start, annotation_spec: Build, store: JobStore
) -> None:
    await start_service(annotation_spec())
    broken = Inline(data=picture().data[:200], media_type="image/png")
    requests = [words(1, seed) for seed in range(4)]
    requests[1] = requests[1].model_copy(update={"image": broken})
    ids = [(await store.submit("annotation", "annotate-text", r))[0].id for r in requests]
    states = [await wait_for(store, job_id, 30) for job_id in ids]
    assert [state.status for state in states] == ["succeeded", "failed", "succeeded", "succeeded"]
    assert states[1].problem is not None
    assert (states[1].problem.code, states[1].problem.field) == ("unreadable_image", "image")


@pytest.mark.slow
async def test_work_of_a_killed_replica_comes_out_the_same_from_another(
    start_service: Start,
    annotation_spec: Build,
    broker: NatsServer,
    store: JobStore,
    tiny_sam: Path,
) -> None:
    environment = {
        **os.environ,
        **broker.environment(),
        "GESSO_JOB_ACK_WAIT_S": "1",
        "GESSO_JOB_FETCH_EXPIRES_S": "1",
        "GESSO_ANNOTATION_FOLDER": str(tiny_sam),
        "GESSO_ANNOTATION_READER": "false",
    }
    command = [sys.executable, "-m", "gesso_services.cli.main", "serve", "annotation"]
    requests = [words(3, seed) for seed in range(12)]
    victim = subprocess.Popen(command, env=environment)
    try:
        for number, request in enumerate(requests):
            await store.submit("annotation", "annotate-text", request, job_id=f"j{number}")
        while (await store.get("j2")).status != "running":
            await asyncio.sleep(0.005)
    finally:
        victim.kill()
        victim.wait()
    await start_service(annotation_spec())
    states = [await wait_for(store, f"j{number}", 60) for number in range(12)]
    assert {state.status for state in states} == {"succeeded"}
    assert max(state.attempt for state in states) == 2
    for request, state in zip(requests, states, strict=True):
        again, _ = await store.submit("annotation", "annotate-text", request)
        other = await wait_for(store, again.id, 60)
        assert state.result is not None
        assert other.result is not None
        # Labels are named by their bytes.
        assert state.result["labels"] == other.result["labels"]
