"""A quantized model in the diffusion service: it draws, and says in which mode and memory."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from gesso_contracts import AskReady, ServiceReady
from gesso_contracts import messages as m
from gesso_core.errors import ConfigError
from gesso_core.pipelines.load import load_denoiser
from gesso_services import autoencoder, diffusion
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from gesso_services.runtime.settings import JobSettings

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]


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


def diffusion_spec(folders: dict[str, Path], **options: object) -> ServiceSpec:
    settings = diffusion.DiffusionSettings.for_service(
        "diffusion", models=(), folders=folders, **options
    )
    return diffusion.build_service(settings)


async def test_a_quantized_folder_is_served_with_mode_and_memory_told_everywhere(
    start: Start,
    store: JobStore,
    gateway: Bus,
    tiny_pipeline: Path,
    quantized_pipeline: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folders = {"dense": tiny_pipeline, "int4": quantized_pipeline}
    coder = autoencoder.AutoencoderSettings.for_service("autoencoder", models=(), folders=folders)
    await start(autoencoder.build_service(coder))
    with caplog.at_level(logging.INFO, logger="gesso_services.diffusion"):
        host = await start(diffusion_spec(folders, quantized_mode="reference"))
    request = m.GenerateImage(
        model="int4", prompt="a red apple", width=64, height=64, seed=7, steps=3
    )
    state, _ = await store.submit("diffusion", "generate-image", request)
    state = await wait_for(store, state.id, 30)
    assert state.status == "succeeded", state.problem
    told = "svdquant-int4-r8 (reference)"
    assert m.ImageReady.model_validate(state.result).provenance.quantization == told

    taken = load_denoiser(quantized_pipeline, quantized_mode="reference").identity.weight_bytes
    ready = await call(gateway, "diffusion", "ready", AskReady(), ServiceReady)
    assert ready.in_use["int4"] == m.ModelInUse(
        quantization=told, weight_bytes=taken, native_size=64, tasks=["text-to-image"], steps=20
    )
    assert ready.in_use["dense"].quantization == "none"
    # Exact, in fp32 and with the branch: more than the dense model.
    assert taken > ready.in_use["dense"].weight_bytes
    labels = f'model="int4",quantization="{told}",service="diffusion"'
    assert f"gesso_model_weight_bytes{{{labels}}} " in host.metrics.text()
    assert f"int4 is loaded: quantization {told}, weights {taken / 1e6:.1f} MB" in caplog.text


async def test_a_mode_that_the_device_has_not_stops_the_start(
    start: Start, quantized_pipeline: Path
) -> None:
    with pytest.raises(ConfigError, match="the best mode there is dequantized"):
        await start(diffusion_spec({"int4": quantized_pipeline}, quantized_mode="w8a8_fp8"))
