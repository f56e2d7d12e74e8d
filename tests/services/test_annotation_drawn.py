"""Signs that are drawn, written on and labelled in one job, over a real broker."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from gesso_contracts import annotations as a
from gesso_contracts import messages as m
from gesso_contracts import parse
from gesso_contracts.jobs import JobProgress, JobState
from gesso_core.annotate.char_sam.pipeline import CharSam
from gesso_core.annotate.char_sam.signs import compose, enlarged
from gesso_core.annotate.masks import overlap
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.errors import NotFound
from gesso_core.pipelines.pictures import decode_picture
from gesso_services import autoencoder, diffusion
from gesso_services.annotation_drawn import picture_id
from gesso_services.annotation_labels import picture_result, text_labels
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from PIL import Image

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]
StartDiffusion = Callable[[], Awaitable[ServiceHost]]
Build = Callable[..., ServiceSpec]
SIZE = (256, 320)


@pytest.fixture
def start_diffusion(start_service: Start, tiny_pipeline: Path) -> StartDiffusion:
    """Autoencoder and diffusion with a model of random weights called ``tiny``; the latter."""
    given = {"models": (), "folders": {"tiny": tiny_pipeline}}

    async def start() -> ServiceHost:
        coder = autoencoder.AutoencoderSettings.for_service("autoencoder", **given)
        await start_service(autoencoder.build_service(coder))
        painter = diffusion.DiffusionSettings.for_service("diffusion", **given)
        return await start_service(diffusion.build_service(painter))

    return start


def wish(**changes: object) -> a.DrawSigns:
    plain: dict[str, object] = {
        "model": "char-sam",
        "generator": "tiny",
        "prompt": "a sign that says OPEN",
        "words": ["UP", "2 h"],
        "pictures": 2,
        "seed": 7,
        "height": SIZE[0],
        "width": SIZE[1],
        "drawn_width": 80,
        "drawn_height": 64,
    }
    return a.DrawSigns.model_validate(plain | changes)


async def finished(store: JobStore, request: a.DrawSigns, job_id: str = "signs") -> JobState:
    await store.submit("annotation", "draw-signs", request, job_id=job_id)
    return await wait_for(store, job_id, 60)


def signs_of(state: JobState) -> a.SignsDrawn:
    assert state.status == "succeeded", state.problem
    return a.SignsDrawn.model_validate(state.result)


def drawn(host: ServiceHost) -> int:
    """Pictures that a diffusion replica has drawn."""
    lines = [line for line in host.metrics.text().splitlines() if 'status="succeeded"' in line]
    return int(sum(float(one.split()[-1]) for one in lines if one.startswith("gesso_jobs_total")))


async def test_what_was_drawn_is_written_on_labelled_and_measured_against_the_truth(
    start_service: Start,
    annotation_spec: Build,
    start_diffusion: StartDiffusion,
    store: JobStore,
    gateway: Bus,
    tiny_sam: Path,
) -> None:
    painter = await start_diffusion()
    await start_service(annotation_spec())
    blobs, annotator = BlobStore(gateway), CharSam(load_segmenter(tiny_sam))
    async with follow(store, "signs", new=True) as events:
        await store.submit("annotation", "draw-signs", wish(), job_id="signs")
        steps = [(e.step, e.total_steps) async for e in events if isinstance(e, JobProgress)]
    assert steps == [(step, 6) for step in range(1, 7)]
    made = signs_of(await store.get("signs"))
    assert [sign.seed for sign in made.pictures] == [7, 8]
    assert (made.generator.model, made.provenance.model) == ("tiny", "char-sam")
    assert made.text == "composed"
    assert made.agreement == pytest.approx(np.mean([sign.agreement for sign in made.pictures]))
    for number, sign in enumerate(made.pictures):
        child = await store.get(picture_id("signs", number))
        assert (child.id, child.service) == (sign.drawn_by, "diffusion")
        ready = m.ImageReady.model_validate(child.result)
        behind = decode_picture(await blobs.get(ready.image))
        composed = compose(enlarged(behind, SIZE), made.words, seed=sign.seed)
        picture = composed.scene.picture_HW3
        np.testing.assert_array_equal(decode_picture(await blobs.get(sign.image)), picture)
        labels = parse(await blobs.get(sign.labels), a.TextLabels)
        assert labels == text_labels(annotator.annotate(picture, composed.scene.words))
        truth = np.asarray(Image.open(BytesIO(await blobs.get(sign.truth))))
        np.testing.assert_array_equal(truth, composed.scene.values_HW)
        assert sign.agreement == overlap(picture_result(labels).mask(), truth > 0).iou
        assert decode_picture(await blobs.get(sign.overlay)).shape == picture.shape

    alone = signs_of(await finished(store, wish(pictures=1, seed=8), "alone"))
    assert alone.pictures[0].truth == made.pictures[1].truth
    both = [decode_picture(await blobs.get(one.pictures[-1].image)) for one in (alone, made)]
    assert np.abs(both[0].astype(int) - both[1]).max() <= 2  # a batch rounds otherwise
    assert drawn(painter) == 3


@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"words": ["OPEN", "京都"]}, "words.1", "no font has '京' (CJK)"),
        ({"words": ["OPEN", "x" * 80]}, "words.1", "or a larger size"),
        ({"words": ["a\u200bb", "\u200b"]}, "words.1", "no character that can be seen"),
        ({"model": "char-sun"}, "model", "available: char-sam"),
        ({"generator": "sana-9000"}, "generator", "unknown model 'sana-9000'"),
        ({"drawn_height": 512}, "drawn_height", "512"),
    ],
)
async def test_what_cannot_be_drawn_or_written_fails_by_its_field_and_leaves_nothing_behind(
    start_service: Start,
    annotation_spec: Build,
    start_diffusion: StartDiffusion,
    store: JobStore,
    changes: dict[str, object],
    field: str,
    sentence: str,
) -> None:
    await start_service(annotation_spec())
    if field in ("generator", "drawn_height"):
        await start_diffusion()
    state = await finished(store, wish(**changes))
    assert state.problem is not None
    assert (state.status, state.problem.field) == ("failed", field), state.problem
    assert sentence in state.problem.detail
    states = [await state_or_none(store, picture_id("signs", number)) for number in range(2)]
    assert not {"queued", "running"} & set(states)


async def state_or_none(store: JobStore, job_id: str) -> str | None:
    try:
        return (await store.get(job_id)).status
    except NotFound:
        return None


async def test_withdrawing_the_job_withdraws_the_pictures_that_are_being_drawn(
    start_service: Start, annotation_spec: Build, store: JobStore
) -> None:
    await start_service(annotation_spec())
    await store.submit("annotation", "draw-signs", wish(pictures=9), job_id="signs")
    children = [picture_id("signs", number) for number in range(9)]
    await until_known(store, children[3])
    await store.cancel("signs")
    assert (await wait_for(store, "signs", 20)).status == "cancelled"
    assert {(await store.get(child)).status for child in children[:4]} == {"cancelled"}
    assert await state_or_none(store, children[4]) is None  # only a few are drawn ahead


async def until_known(store: JobStore, job_id: str) -> None:
    async with asyncio.timeout(20):
        while await state_or_none(store, job_id) is None:
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_a_missing_diffusion_service_is_waited_for_and_then_joined(
    start_service: Start,
    annotation_spec: Build,
    start_diffusion: StartDiffusion,
    store: JobStore,
) -> None:
    await start_service(annotation_spec(drawing_patience_s=0.2))
    await store.submit("annotation", "draw-signs", wish(), job_id="signs")
    async with asyncio.timeout(20):
        while (state := await store.get("signs")).problem is None:
            await asyncio.sleep(0.02)
    assert state.status == "queued"
    assert "is the diffusion service running?" in state.problem.detail
    painter = await start_diffusion()
    state = await wait_for(store, "signs", 40)
    assert (state.status, state.attempt, drawn(painter)) == ("succeeded", 1, 2)


@pytest.mark.slow
async def test_a_killed_workers_job_joins_the_same_pictures_and_draws_none_twice(
    start_service: Start,
    annotation_spec: Build,
    start_diffusion: StartDiffusion,
    broker: NatsServer,
    store: JobStore,
    tiny_sam: Path,
) -> None:
    painter = await start_diffusion()
    environment = {
        **os.environ,
        **broker.environment(),
        "GESSO_JOB_ACK_WAIT_S": "1",
        "GESSO_JOB_FETCH_EXPIRES_S": "1",
        "GESSO_ANNOTATION_FOLDER": str(tiny_sam),
        "GESSO_ANNOTATION_READER": "false",
    }
    command = [sys.executable, "-m", "gesso_services.cli.main", "serve", "annotation"]
    victim = subprocess.Popen(command, env=environment)
    try:
        await store.submit("annotation", "draw-signs", wish(pictures=6), job_id="signs")
        async with asyncio.timeout(60):
            while (await store.get("signs")).step < 4:  # the second picture is being labelled
                await asyncio.sleep(0.01)
    finally:
        victim.kill()
        victim.wait()
    before = drawn(painter)
    await start_service(annotation_spec())
    state = await wait_for(store, "signs", 60)
    made = signs_of(state)
    assert state.attempt == 2
    assert before > 0
    assert drawn(painter) == len(made.pictures) == 6
    again = signs_of(await finished(store, wish(pictures=6), "again"))
    assert [sign.truth for sign in again.pictures] == [sign.truth for sign in made.pictures]
