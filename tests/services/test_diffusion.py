"""The diffusion service with the autoencoder service, over a real broker."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_contracts import messages as m
from gesso_contracts.jobs import JobPreview, JobProgress, JobState, JobStateChanged
from gesso_core.errors import UnknownModel
from gesso_core.pipelines.pictures import Pixels, decode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_services import autoencoder, diffusion
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from gesso_services.runtime.settings import JobSettings
from safetensors.torch import load

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[..., Awaitable[ServiceHost]]


@pytest.fixture
async def start(broker: NatsServer, job_settings: JobSettings) -> AsyncIterator[Start]:
    """Start a replica of a service in this process; stopped when the test is over."""
    async with AsyncExitStack() as running:

        async def start_one(spec: ServiceSpec) -> ServiceHost:
            host = ServiceHost(spec, bus_settings=broker.bus_settings(), job_settings=job_settings)
            running.push_async_callback(host.stop, 0.2)
            await host.start()
            return host

        yield start_one


@pytest.fixture
def autoencoder_spec(tiny_pipeline: Path) -> ServiceSpec:
    settings = autoencoder.AutoencoderSettings.for_service(
        "autoencoder", models=(), folders={"tiny": tiny_pipeline}
    )
    return autoencoder.build_service(settings)


@pytest.fixture
def diffusion_spec(tiny_pipeline: Path) -> Callable[..., ServiceSpec]:
    def build(**options: object) -> ServiceSpec:
        settings = diffusion.DiffusionSettings.for_service(
            "diffusion", models=(), folders={"tiny": tiny_pipeline}, **options
        )
        return diffusion.build_service(settings)

    return build


@pytest.fixture
async def services(
    start: Start, autoencoder_spec: ServiceSpec, diffusion_spec: Callable[..., ServiceSpec]
) -> ServiceHost:
    """Both services; the diffusion replica."""
    await start(autoencoder_spec)
    return await start(diffusion_spec())


def wish(**changes: object) -> m.GenerateImage:
    plain = {"model": "tiny", "prompt": "a red apple", "width": 64, "height": 64, "seed": 7}
    return m.GenerateImage(**(plain | {"steps": 4} | changes))


async def pixels_of(state: JobState, bus: Bus) -> Pixels:
    assert state.status == "succeeded", state.problem
    ready = m.ImageReady.model_validate(state.result)
    pixels = decode_picture(await BlobStore(bus).get(ready.image))
    assert pixels.shape == (ready.height, ready.width, 3)
    return pixels


async def finished(store: JobStore, request: m.GenerateImage, timeout: float = 30) -> JobState:
    state, _ = await store.submit("diffusion", "generate-image", request)
    return await wait_for(store, state.id, timeout)


def local_pixels(pipeline: TextToImage, request: m.GenerateImage) -> Pixels:
    wished = GenerationRequest(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        seed=request.seed,
        steps=request.steps,
    )
    return pipeline(wished)[0].pixels_HWC


def jobs_done(host: ServiceHost) -> int:
    lines = [line for line in host.metrics.text().splitlines() if 'status="succeeded"' in line]
    counts = [float(line.split()[-1]) for line in lines if line.startswith("gesso_jobs_total")]
    return int(sum(counts))


async def test_a_prompt_becomes_the_picture_that_the_pipeline_draws(
    services: ServiceHost, store: JobStore, gateway: Bus, tiny_pipeline: Path
) -> None:
    request = wish(width=96, height=64)
    state = await finished(store, request)
    expected = local_pixels(TextToImage.load(tiny_pipeline), request)
    assert np.array_equal(await pixels_of(state, gateway), expected)


async def test_the_result_says_what_made_it(
    services: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    state = await finished(store, wish(steps=None, output_format="webp"))
    ready = m.ImageReady.model_validate(state.result)
    made = ready.provenance
    assert (made.model, made.sampler, made.steps) == ("tiny", "flow-dpm-solver", 20)
    assert made.versions["torch"] == torch.__version__
    assert (ready.seed, ready.image.media_type) == (7, "image/webp")
    assert (state.step, state.total_steps, state.progress) == (20, 20, 1.0)


async def test_every_step_is_told_and_previews_come_before_the_end(
    services: ServiceHost, store: JobStore
) -> None:
    job_id = "told"
    async with follow(store, job_id, new=True) as events:
        await store.submit(
            "diffusion", "generate-image", wish(steps=40, preview_every=1), job_id=job_id
        )
        seen = [event async for event in events]
    steps = [event.step for event in seen if isinstance(event, JobProgress)]
    assert steps == list(range(1, 41))
    previews = [event for event in seen if isinstance(event, JobPreview)]
    assert decode_picture(previews[0].image).shape == (64, 64, 3)
    assert isinstance(seen[-1], JobStateChanged)
    assert seen[-1].state.status == "succeeded"


async def test_a_slow_autoencoder_costs_previews_but_not_the_picture(
    start: Start,
    autoencoder_spec: ServiceSpec,
    diffusion_spec: Callable[..., ServiceSpec],
    store: JobStore,
) -> None:
    decode = autoencoder_spec.rpc["decode"]
    painted: list[str] = []

    async def slowly(request: m.DecodeLatent) -> m.LatentDecoded:
        painted.append(request.output_format)
        await asyncio.sleep(0.2)
        return await decode(request)

    autoencoder_spec.rpc["decode"] = slowly
    await start(autoencoder_spec)
    await start(diffusion_spec())
    painted.clear()
    state = await finished(store, wish(steps=60, preview_every=1))
    assert state.status == "succeeded"
    assert painted.count("png") == 1
    assert 1 <= painted.count("webp") < 10


async def test_a_cancelled_job_stops_and_its_place_is_free(
    start: Start,
    autoencoder_spec: ServiceSpec,
    diffusion_spec: Callable[..., ServiceSpec],
    store: JobStore,
) -> None:
    await start(autoencoder_spec)
    host = await start(diffusion_spec(slots=1))
    async with follow(store, "long", new=True) as events:
        await store.submit("diffusion", "generate-image", wish(steps=100), job_id="long")
        async for event in events:
            if isinstance(event, JobProgress):
                await store.cancel("long")
                break
        last = [event async for event in events][-1]
    assert isinstance(last, JobStateChanged)
    assert last.state.status == "cancelled"
    assert last.state.step < 100
    assert (await finished(store, wish())).status == "succeeded"
    assert host.worker is not None
    assert host.worker.running == 0


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"model": "sana-1.6b-1024"}, "unknown_model", "model"),
        ({"width": 1024, "height": 1024}, "invalid_request", "height"),
        ({"sampler": "scm"}, "invalid_request", "sampler"),
        ({"width": 320}, "invalid_request", "width"),
    ],
    ids=["model", "size", "sampler", "proportions"],
)
async def test_what_the_model_cannot_do_fails_with_the_field(
    services: ServiceHost, store: JobStore, changes: dict[str, object], code: str, field: str
) -> None:
    state = await finished(store, wish(**changes))
    assert state.status == "failed"
    assert state.problem is not None
    assert (state.problem.code, state.problem.field) == (code, field)


@pytest.mark.slow
async def test_a_job_waits_for_an_autoencoder_that_restarts(
    start: Start,
    autoencoder_spec: ServiceSpec,
    diffusion_spec: Callable[..., ServiceSpec],
    store: JobStore,
    tiny_pipeline: Path,
) -> None:
    first = await start(autoencoder_spec)
    await start(diffusion_spec())
    await first.stop(0.2)
    state, _ = await store.submit("diffusion", "generate-image", wish())
    state = await wait_for(store, state.id, timeout=1.0)
    assert (state.status, state.attempt) == ("running", 1)
    settings = autoencoder.AutoencoderSettings.for_service(
        "autoencoder", models=(), folders={"tiny": tiny_pipeline}
    )
    await start(autoencoder.build_service(settings))
    state = await wait_for(store, state.id, timeout=20)
    assert (state.status, state.attempt) == ("succeeded", 1)


@pytest.mark.slow
async def test_diffusion_is_not_ready_before_a_picture_went_through_the_autoencoder(
    start: Start, autoencoder_spec: ServiceSpec, diffusion_spec: Callable[..., ServiceSpec]
) -> None:
    starting = asyncio.create_task(start(diffusion_spec(decode_patience_s=0.1)))
    done, _ = await asyncio.wait({starting}, timeout=2)
    assert not done
    await start(autoencoder_spec)
    assert (await starting).is_ready


async def test_a_picture_is_the_same_alone_and_among_others(
    services: ServiceHost, store: JobStore, gateway: Bus, tiny_pipeline: Path
) -> None:
    requests = [wish(seed=seed, prompt=f"{seed} red apples", steps=10 + seed) for seed in range(8)]
    states = await asyncio.gather(*(finished(store, request) for request in requests))
    pipeline = TextToImage.load(tiny_pipeline)
    for request, state in zip(requests, states, strict=True):
        pixels, alone = await pixels_of(state, gateway), local_pixels(pipeline, request)
        assert np.abs(pixels.astype(int) - alone).max() <= 1
    assert 'gesso_batch_size_bucket{le="1.0"' in services.metrics.text()


async def test_a_second_replica_takes_over_part_of_the_queue(
    start: Start,
    autoencoder_spec: ServiceSpec,
    diffusion_spec: Callable[..., ServiceSpec],
    store: JobStore,
) -> None:
    await start(autoencoder_spec)
    first = await start(diffusion_spec(slots=1))
    waiting = [
        asyncio.create_task(finished(store, wish(seed=seed, steps=30))) for seed in range(16)
    ]
    second = await start(diffusion_spec(slots=1))
    states = await asyncio.gather(*waiting)
    assert {state.status for state in states} == {"succeeded"}
    assert jobs_done(first) + jobs_done(second) == 16
    assert min(jobs_done(first), jobs_done(second)) >= 2


async def test_text_states_are_those_of_the_encoder(
    services: ServiceHost, gateway: Bus, tiny_pipeline: Path
) -> None:
    request = m.EmbedText(model="tiny", prompts=["a red apple", "two pears"])
    embedded = await call(gateway, "diffusion", "embed-text", request, m.TextEmbedded)
    tensors = load(await BlobStore(gateway).read(embedded.states))
    local = TextToImage.load(tiny_pipeline).denoiser.text_encoder.encode(request.prompts)
    torch.testing.assert_close(tensors["states"], local.states_BLC)
    assert torch.equal(tensors["mask"], local.mask_BL)
    unknown = m.EmbedText(model="other", prompts=["x"])
    with pytest.raises(UnknownModel, match="available: tiny"):
        await call(gateway, "diffusion", "embed-text", unknown, m.TextEmbedded)


@pytest.mark.slow
async def test_two_hundred_requests_of_mixed_sizes_all_become_pictures(
    services: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    sizes = [(64, 64), (96, 64), (64, 96), (128, 32), (128, 128)]
    requests = [
        wish(seed=seed, width=sizes[seed % 5][0], height=sizes[seed % 5][1], steps=2 + seed % 7)
        for seed in range(200)
    ]
    states = await asyncio.gather(*(finished(store, request, 120) for request in requests))
    for request, state in zip(requests, states, strict=True):
        assert (await pixels_of(state, gateway)).shape == (request.height, request.width, 3)
    assert jobs_done(services) == 200
