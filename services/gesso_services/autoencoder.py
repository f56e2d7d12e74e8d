"""The autoencoder service: pictures to latents and back.

One thread runs the models, so that the event loop stays free for health checks and the next calls.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from gesso_contracts import SAFETENSORS, limits
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_core.errors import UnknownModel
from gesso_core.hub import DEFAULT_STORE
from gesso_core.pipelines.autoencoder import Autoencoder, Reconstruction
from gesso_core.pipelines.pictures import (
    MAX_PIXELS,
    MEDIA_TYPES,
    Pixels,
    blank_picture,
    decode_picture,
    encode_picture,
)
from gesso_core.pipelines.tensor_bytes import pack_tensors, unpack_tensor
from pydantic import Field

from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext, ServiceSpec
from gesso_services.runtime.settings import ServiceSettings

P = ParamSpec("P")
T = TypeVar("T")


class AutoencoderSettings(ServiceSettings):
    """Options of the service; environment ``GESSO_AUTOENCODER_*``."""

    models: tuple[str, ...] = Field(
        ("dcae-tiny", "vilau-tiny-tower"), description="registry names to serve"
    )
    folders: dict[str, Path] = Field(
        default_factory=dict, description="model folders to serve, by the name they get"
    )
    store: Path = Field(DEFAULT_STORE, description="where pulled models lie")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(1, ge=1, description="CPU threads of one model call")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest picture that is opened")


class AutoencoderService:
    """One replica: every model of its settings, in memory."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        self.settings = settings
        self.models: dict[str, Autoencoder] = {}
        self._thread = ThreadPoolExecutor(
            1, "autoencoder", initializer=torch.set_num_threads, initargs=(settings.threads,)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What is served."""
        return (*self.settings.models, *self.settings.folders)

    async def start(self, context: ServiceContext) -> None:
        """Load every model."""
        self.blobs = context.blobs
        for name in self.names:
            self.models[name] = await self._run(self._load, name)

    async def warm_up(self, context: ServiceContext) -> None:
        """A small picture through every model."""
        image = Inline(data=encode_picture(blank_picture(64, 64)), media_type=MEDIA_TYPES["png"])
        for name in self.names:
            await self.reconstruct(m.Reconstruct(model=name, image=image))

    async def stop(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, request: m.EncodeImage) -> m.ImageEncoded:
        """Picture to latent."""
        model, data = self._model(request.model), await self.blobs.read(request.image)
        latent, shape = await self._run(self._encode, model, data)
        packed = await self.blobs.pack(
            latent,
            SAFETENSORS,
            inline_limit=limits.INLINE_RPC_BYTES,
            dtype="float32",
            shape=shape,
        )
        return m.ImageEncoded(latent=packed)

    async def decode(self, request: m.DecodeLatent) -> m.LatentDecoded:
        """Latent to picture."""
        model, data = self._model(request.model), await self.blobs.read(request.latent)
        image, pixels = await self._run(_decode, model, data, request)
        height, width = pixels.shape[:2]
        packed = await self.blobs.pack(
            image, MEDIA_TYPES[request.output_format], inline_limit=limits.INLINE_RPC_BYTES
        )
        return m.LatentDecoded(image=packed, width=width, height=height)

    async def reconstruct(
        self, request: m.Reconstruct, *, inline_limit: int = limits.INLINE_RPC_BYTES
    ) -> m.Reconstructed:
        """Round trip with PSNR and SSIM."""
        model, data = self._model(request.model), await self.blobs.read(request.image)
        image, made = await self._run(self._reconstruct, model, data, request.output_format)
        height, width = made.pixels_HWC.shape[:2]
        return m.Reconstructed(
            image=await self.blobs.pack(
                image, MEDIA_TYPES[request.output_format], inline_limit=inline_limit
            ),
            width=width,
            height=height,
            psnr_db=made.psnr_db,
            ssim=made.ssim,
        )

    async def reconstruct_job(self, request: m.Reconstruct, job: JobContext) -> m.Reconstructed:
        """The round trip as a job of one step."""
        job.report(0, 1)
        answer = await self.reconstruct(request, inline_limit=limits.INLINE_JOB_BYTES)
        job.report(1, 1)
        return answer

    def _load(self, name: str) -> Autoencoder:
        settings = self.settings
        return Autoencoder.load(
            settings.folders.get(name, name),
            dtype=getattr(torch, settings.dtype),
            device=settings.device,
            store=settings.store,
        )

    def _model(self, name: str) -> Autoencoder:
        if name not in self.models:
            raise UnknownModel(name, self.models)
        return self.models[name]

    def _encode(self, model: Autoencoder, data: bytes) -> tuple[bytes, tuple[int, ...]]:
        latent = model.encode(decode_picture(data, max_pixels=self.settings.max_pixels))
        return pack_tensors({"latent": latent}), tuple(latent.shape)

    def _reconstruct(
        self, model: Autoencoder, data: bytes, output_format: m.ImageFormat
    ) -> tuple[bytes, Reconstruction]:
        made = model.reconstruct(decode_picture(data, max_pixels=self.settings.max_pixels))
        return encode_picture(made.pixels_HWC, output_format), made

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(*args, **kwargs))


def _decode(model: Autoencoder, data: bytes, request: m.DecodeLatent) -> tuple[bytes, Pixels]:
    pixels = model.decode(unpack_tensor(data, "latent"), request.height, request.width)
    return encode_picture(pixels, request.output_format), pixels


def build_service(settings: AutoencoderSettings | None = None) -> ServiceSpec:
    """The service as the runtime hosts it."""
    service = AutoencoderService(settings or AutoencoderSettings.for_service("autoencoder"))
    return ServiceSpec(
        name="autoencoder",
        settings=service.settings,
        rpc={
            "encode": service.encode,
            "decode": service.decode,
            "reconstruct": service.reconstruct,
        },
        jobs={"reconstruct": service.reconstruct_job},
        start=service.start,
        warm_up=service.warm_up,
        stop=service.stop,
        models=service.names,
    )
