"""Pictures drawn token by token, by the real services over a real broker."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_contracts.jobs import JobPreview, JobProgress, JobState, JobStateChanged
from gesso_core.pipelines.draw import DrawPicture
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.service import ServiceHost, ServiceSpec

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]
MODELS = ("scales", "seer")
ROWS = 4  # of the one, and scales of the other


@pytest.fixture
def store(token_store: JobStore) -> JobStore:
    return token_store


@pytest.fixture
def gateway(token_bus: Bus) -> Bus:
    return token_bus


def wish(model: str = "scales", **changes: object) -> m.GenerateImage:
    plain = {"model": model, "prompt": "a red apple", "width": 64, "height": 64, "seed": 7}
    return m.GenerateImage(**(plain | changes))


def gradient(side: int = 64) -> Pixels:
    red, green = np.meshgrid(np.linspace(0, 255, side), np.linspace(0, 255, side))
    return np.stack([red, green, 128 + 0 * red], axis=-1).astype(np.uint8)


def vary(model: str, keep: int, pixels: Pixels | None = None, **changes: object) -> m.VaryImage:
    image = Inline(
        data=encode_picture(gradient() if pixels is None else pixels), media_type="image/png"
    )
    wished = wish(model, **changes).model_dump() | {"image": image, "keep": keep}
    return m.VaryImage(**wished)


async def finished(store: JobStore, request: m.GenerateImage, timeout: float = 30) -> JobState:
    kind = "vary-image" if isinstance(request, m.VaryImage) else "generate-image"
    state, _ = await store.submit("autoregressive", kind, request)
    return await wait_for(store, state.id, timeout)


async def pixels_of(state: JobState, bus: Bus) -> Pixels:
    assert state.status == "succeeded", state.problem
    ready = m.ImageReady.model_validate(state.result)
    pixels = decode_picture(await BlobStore(bus).get(ready.image))
    assert pixels.shape == (ready.height, ready.width, 3)
    return pixels


async def drawn(store: JobStore, bus: Bus, request: m.GenerateImage) -> Pixels:
    return await pixels_of(await finished(store, request), bus)


@pytest.mark.parametrize("model", MODELS)
async def test_the_seed_and_the_words_decide_the_picture(
    token_services: ServiceHost, store: JobStore, gateway: Bus, model: str
) -> None:
    first = await drawn(store, gateway, wish(model))
    assert first.std() > 1
    assert np.array_equal(first, await drawn(store, gateway, wish(model)))
    assert not np.array_equal(first, await drawn(store, gateway, wish(model, seed=8)))
    assert not np.array_equal(first, await drawn(store, gateway, wish(model, prompt="two pears")))


@pytest.mark.parametrize("model", MODELS)
async def test_every_step_is_told_and_a_preview_comes_before_the_end(
    token_services: ServiceHost, store: JobStore, model: str
) -> None:
    async with follow(store, f"told-{model}", new=True) as events:
        request = wish(model, preview_every=1)
        await store.submit("autoregressive", "generate-image", request, job_id=f"told-{model}")
        seen = [event async for event in events]
    steps = [event.step for event in seen if isinstance(event, JobProgress)]
    assert steps == list(range(1, ROWS + 1))
    previews = [event for event in seen if isinstance(event, JobPreview)]
    assert 1 <= len(previews) < ROWS
    assert decode_picture(previews[0].image).shape == (64, 64, 3)
    assert isinstance(seen[-1], JobStateChanged)
    assert seen[-1].state.status == "succeeded"


@pytest.mark.parametrize(("model", "sampler"), [("scales", "next-scale"), ("seer", "next-token")])
async def test_the_result_says_what_made_it(
    token_services: ServiceHost, store: JobStore, model: str, sampler: str
) -> None:
    request = wish(model, guidance_scale=2.5, top_k=3, top_p=0.9, output_format="webp")
    state = await finished(store, request)
    ready = m.ImageReady.model_validate(state.result)
    made = ready.provenance
    assert (made.model, made.sampler, made.steps) == (model, sampler, ROWS)
    assert (made.guidance_scale, ready.seed) == (2.5, 7)
    assert (made.top_k, made.top_p, made.keep) == (3, 0.9, None)
    assert ready.image.media_type == "image/webp"
    assert len(made.weights_sha256) == 64


async def test_a_mixed_crowd_is_drawn_as_the_pipelines_draw_each_alone(
    token_services: ServiceHost, store: JobStore, gateway: Bus, tiny_hart: Path, tiny_vila_u: Path
) -> None:
    requests = [
        wish(
            MODELS[i % 2],
            seed=i,
            prompt=f"{i} red apples " * (1 + i % 3),
            guidance_scale=(None, 1.0, 4.0, 2.0)[i % 4],
            top_k=(None, 3, 12)[i % 3],
        )
        for i in range(10)
    ]
    before = shared_steps(token_services.metrics.text())
    together = await asyncio.gather(*(drawn(store, gateway, request) for request in requests))
    assert shared_steps(token_services.metrics.text()) > before
    draw = {"scales": DrawPicture.load(tiny_hart), "seer": DrawPicture.load(tiny_vila_u)}
    for request, pixels in zip(requests, together, strict=True):
        fields = ("prompt", "width", "height", "seed", "guidance_scale", "top_k")
        alone = GenerationRequest(**{name: getattr(request, name) for name in fields})
        assert np.array_equal(pixels, draw[request.model](alone)[0].pixels_HWC)


def shared_steps(text: str) -> int:
    counts = {
        line.split('le="')[1].split('"')[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("gesso_batch_size_bucket")
    }
    return int(counts["+Inf"] - counts["1.0"])


async def test_a_picture_keeps_the_first_scales_of_another(
    token_services: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    """The more is kept, the closer two drawings of different seeds come to each other."""
    apart = []
    for keep in (1, 3):
        pair = [await drawn(store, gateway, vary("scales", keep, seed=seed)) for seed in (1, 2)]
        apart.append(np.abs(pair[0].astype(int) - pair[1]).mean())
    assert apart[1] < apart[0]


async def test_a_picture_keeps_the_first_rows_of_another(
    token_services: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    first = await drawn(store, gateway, vary("seer", 3, seed=1))
    second = await drawn(store, gateway, vary("seer", 3, seed=2))
    same = np.abs(first.astype(int) - second).mean(axis=(1, 2))
    assert same[:16].mean() < same[48:].mean()
    plain = await drawn(store, gateway, wish("seer", seed=1))
    assert not np.array_equal(first, plain)


async def test_a_model_that_sees_draws_after_looking(
    token_services: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    looked = [
        await drawn(store, gateway, vary("seer", 0, pixels))
        for pixels in (gradient(), gradient()[::-1].copy())
    ]
    plain = await drawn(store, gateway, wish("seer"))
    assert not np.array_equal(looked[0], looked[1])
    assert not np.array_equal(looked[0], plain)


async def test_what_a_model_cannot_do_fails_with_the_field(
    token_services: ServiceHost, store: JobStore
) -> None:
    loras = [m.LoraUse(name="ink")]
    for request, code, field in (
        (wish("sana-tiny"), "unknown_model", "model"),
        (wish("scales", negative_prompt="blue"), "invalid_request", "negative_prompt"),
        (wish("seer", negative_prompt="blue"), "invalid_request", "negative_prompt"),
        (wish("scales", steps=3), "invalid_request", "steps"),
        (wish("seer", steps=3), "invalid_request", "steps"),
        (wish("scales", sampler="flow-euler"), "invalid_request", "sampler"),
        (wish("scales", loras=loras), "invalid_request", "loras"),
        (wish("scales", width=512, height=512), "invalid_request", "height"),
        (wish("scales", prompt="red " * 900), "invalid_request", "prompt"),
        (wish("seer", prompt="red " * 900), "invalid_request", "prompt"),
        (wish("seer", prompt="<image> in red"), "invalid_request", "prompt"),
        (vary("scales", 0), "invalid_request", "keep"),
        (vary("scales", 4), "invalid_request", "keep"),
        (vary("seer", 4), "invalid_request", "keep"),
    ):
        state = await finished(store, request)
        assert state.status == "failed", request
        assert state.problem is not None
        assert (state.problem.code, state.problem.field) == (code, field), state.problem


async def test_bytes_that_are_no_picture_are_refused(
    token_services: ServiceHost, store: JobStore
) -> None:
    junk = vary("seer", 0).model_copy(
        update={"image": Inline(data=b"junk", media_type="image/png")}
    )
    state = await finished(store, junk)
    assert state.problem is not None
    assert (state.problem.code, state.problem.field) == ("unreadable_image", "image")


async def test_the_replica_says_what_it_has_loaded(
    token_services: ServiceHost, tiny_hart: Path
) -> None:
    in_use = token_services.spec.in_use()
    assert set(in_use) == set(MODELS)
    assert {about.native_size for about in in_use.values()} == {64}
    assert all(about.weight_bytes > 1000 for about in in_use.values())
