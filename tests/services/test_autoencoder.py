"""The autoencoder service over a real broker."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_contracts import SAFETENSORS
from gesso_contracts import messages as m
from gesso_contracts.blobs import BlobRef, Inline
from gesso_core.errors import InvalidRequest, UnknownModel, UnreadableImage
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.pipelines.pictures import decode_picture, encode_picture
from gesso_core.pipelines.tensor_bytes import pack_tensors, unpack_tensor
from gesso_services.autoencoder import AutoencoderSettings, build_service
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost
from gesso_services.runtime.settings import JobSettings

pytestmark = [pytest.mark.anyio, pytest.mark.broker]


@pytest.fixture
async def start(
    broker: NatsServer, job_settings: JobSettings, tiny_pipeline: Path
) -> AsyncIterator[Callable[..., Awaitable[ServiceHost]]]:
    """Start a replica in this process; stopped when the test is over."""
    async with AsyncExitStack() as running:

        async def start_one(**options: object) -> ServiceHost:
            settings = AutoencoderSettings.for_service(
                "autoencoder", models=(), folders={"tiny": tiny_pipeline}, **options
            )
            host = ServiceHost(
                build_service(settings),
                bus_settings=broker.bus_settings(),
                job_settings=job_settings,
            )
            await host.start()
            running.push_async_callback(host.stop, 0.2)
            return host

        yield start_one


@pytest.fixture
async def autoencoder(start: Callable[..., Awaitable[ServiceHost]]) -> ServiceHost:
    return await start(max_pixels=256 * 256)


def noise(height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inline(pixels: np.ndarray) -> Inline:
    return Inline(data=encode_picture(pixels, "png"), media_type="image/png")


async def test_encode_and_decode_are_those_of_the_model(
    autoencoder: ServiceHost, gateway: Bus, tiny_pipeline: Path
) -> None:
    local = Autoencoder.load(tiny_pipeline)
    encoded = await call(
        gateway, "autoencoder", "encode", m.EncodeImage(model="tiny", image=inline(noise())),
        m.ImageEncoded,
    )  # fmt: skip
    assert encoded.latent.shape == (8, 3, 4)
    latent = unpack_tensor(await BlobStore(gateway).read(encoded.latent), "latent")
    torch.testing.assert_close(latent, local.encode(noise()))
    decoded = await call(
        gateway, "autoencoder", "decode",
        m.DecodeLatent(model="tiny", latent=encoded.latent, height=40, width=50),
        m.LatentDecoded,
    )  # fmt: skip
    assert (decoded.height, decoded.width) == (40, 50)
    pixels = decode_picture(await BlobStore(gateway).read(decoded.image))
    assert np.array_equal(pixels, local.decode(latent, 40, 50))


async def test_a_reconstruction_is_measured(
    autoencoder: ServiceHost, gateway: Bus, tiny_pipeline: Path
) -> None:
    local = Autoencoder.load(tiny_pipeline).reconstruct(noise())
    request = m.Reconstruct(model="tiny", image=inline(noise()), output_format="webp")
    made = await call(gateway, "autoencoder", "reconstruct", request, m.Reconstructed)
    assert (made.height, made.width) == (40, 56)
    assert made.psnr_db == pytest.approx(local.psnr_db)
    assert made.ssim == pytest.approx(local.ssim)
    assert made.image.media_type == "image/webp"


async def test_a_picture_may_come_as_a_blob_and_as_a_job(
    autoencoder: ServiceHost, gateway: Bus, store: JobStore
) -> None:
    blob = await BlobStore(gateway).put(encode_picture(noise(), "png"), "image/png")
    state, _ = await store.submit(
        "autoencoder", "reconstruct", m.Reconstruct(model="tiny", image=blob)
    )
    state = await wait_for(store, state.id, timeout=20)
    assert (state.status, state.progress) == ("succeeded", 1.0)
    assert m.Reconstructed.model_validate(state.result).width == 56


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"not a picture", "not a whole picture"),
        (encode_picture(noise(), "png")[:2000], "not a whole picture"),
        (encode_picture(noise(300, 300), "png"), "300x300, 90,000 pixels; at most 65,536"),
    ],
    ids=["text", "truncated", "too-large"],
)
async def test_a_picture_that_is_none_is_refused_and_the_service_lives_on(
    autoencoder: ServiceHost, gateway: Bus, data: bytes, complaint: str
) -> None:
    request = m.EncodeImage(model="tiny", image=Inline(data=data, media_type="image/png"))
    with pytest.raises(UnreadableImage, match=complaint) as refusal:
        await call(gateway, "autoencoder", "encode", request, m.ImageEncoded)
    assert refusal.value.field == "image"
    good = m.EncodeImage(model="tiny", image=inline(noise()))
    assert await call(gateway, "autoencoder", "encode", good, m.ImageEncoded)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"x" * 100, "not a safetensors file"),
        (pack_tensors({"other": torch.zeros(8, 2, 2)}), "one tensor named 'latent', found other"),
        (pack_tensors({"latent": torch.zeros(3, 2, 2)}), r"shape \(3, 2, 2\)"),
    ],
    ids=["garbage", "another-name", "another-shape"],
)
async def test_a_latent_that_is_none_is_refused(
    autoencoder: ServiceHost, gateway: Bus, data: bytes, complaint: str
) -> None:
    request = m.DecodeLatent(model="tiny", latent=Inline(data=data, media_type=SAFETENSORS))
    with pytest.raises(InvalidRequest, match=complaint):
        await call(gateway, "autoencoder", "decode", request, m.LatentDecoded)


async def test_an_unknown_model_is_refused_with_those_that_are_served(
    autoencoder: ServiceHost, gateway: Bus
) -> None:
    request = m.EncodeImage(model="dc-ae-f32c32-in-1.0", image=inline(noise()))
    with pytest.raises(UnknownModel, match="available: tiny"):
        await call(gateway, "autoencoder", "encode", request, m.ImageEncoded)


async def test_an_answer_too_large_for_a_message_comes_as_a_blob(
    start: Callable[..., Awaitable[ServiceHost]], gateway: Bus
) -> None:
    await start()
    latent = pack_tensors({"latent": torch.randn(8, 100, 100)})
    request = m.DecodeLatent(model="tiny", latent=Inline(data=latent, media_type=SAFETENSORS))
    decoded = await call(gateway, "autoencoder", "decode", request, m.LatentDecoded)
    assert isinstance(decoded.image, BlobRef)
    pixels = decode_picture(await BlobStore(gateway).get(decoded.image))
    assert pixels.shape == (1600, 1600, 3)
