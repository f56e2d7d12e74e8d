"""A small real diffusion service, and an autoencoder beside it, for the tests of the HTTP edge.

It draws a gradient from the seed, step by step, with previews. The prompt says how it behaves:
"slowly" takes its time, "too large" runs out of memory, "unheard of" is out of its domain.
"""

import asyncio

import numpy as np
from gesso_contracts import (
    GenerateImage,
    ImageReady,
    LoraUsed,
    ModelInUse,
    Provenance,
    Reconstruct,
    Reconstructed,
)
from gesso_core.errors import OutOfMemory
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, decode_picture, encode_picture
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext, ServiceSpec
from gesso_services.runtime.settings import ServiceSettings

MODEL, AUTOENCODER = "sana-tiny", "dcae-tiny"
SLOW_STEP_S = 0.15
IN_USE = ModelInUse(
    quantization="svdquant-int4-r32 (dequantized)", weight_bytes=14_000_000, native_size=64
)


def gradient(seed: int, width: int, height: int) -> Pixels:
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    blue = np.full_like(red, seed % 256)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


class Painter:
    async def start(self, context: ServiceContext) -> None:
        self.blobs = context.blobs

    async def warm_up(self, context: ServiceContext) -> None:
        request = GenerateImage(model=MODEL, prompt="a gradient", width=64, height=64, seed=0)
        await self.generate(request, context.trial_job())

    async def generate(self, request: GenerateImage, job: JobContext) -> ImageReady:
        steps = request.steps or 4
        if "too large" in request.prompt:
            raise OutOfMemory("the picture does not fit; try a smaller size")
        pixels = gradient(request.seed, request.width, request.height)
        for step in range(1, steps + 1):
            await asyncio.sleep(SLOW_STEP_S if "slowly" in request.prompt else 0.002)
            if request.preview_every and step % request.preview_every == 0:
                job.preview(encode_picture(pixels // (steps - step + 1), "webp"), step)
            job.report(step, steps)
        data = encode_picture(pixels, request.output_format)
        known = "unheard of" not in request.prompt
        return ImageReady(
            image=await self.blobs.put(data, MEDIA_TYPES[request.output_format]),
            width=request.width,
            height=request.height,
            seed=request.seed,
            provenance=Provenance(
                model=request.model,
                revision="shipped",
                weights_sha256="0" * 64,
                sampler=request.sampler or "flow-dpm-solver",
                steps=steps,
                guidance_scale=3.0 if request.guidance_scale is None else request.guidance_scale,
                versions={"gesso": "0.1.0"},
                in_domain=known,
                suggestions=[] if known else ["a red apple", "a yellow star"],
                loras=[LoraUsed(**use.model_dump(), sha256="0" * 64) for use in request.loras],
            ),
        )


class Coder:
    async def start(self, context: ServiceContext) -> None:
        self.blobs = context.blobs

    async def reconstruct(self, request: Reconstruct) -> Reconstructed:
        pixels = decode_picture(await self.blobs.read(request.image))
        data = encode_picture(pixels, request.output_format)
        return Reconstructed(
            image=await self.blobs.pack(data, MEDIA_TYPES[request.output_format]),
            width=pixels.shape[1],
            height=pixels.shape[0],
            psnr_db=100.0,
            ssim=1.0,
        )


def painter_spec() -> ServiceSpec:
    painter = Painter()
    return ServiceSpec(
        name="diffusion",
        settings=ServiceSettings(slots=4),
        jobs={"generate-image": painter.generate},
        start=painter.start,
        warm_up=painter.warm_up,
        models=(MODEL,),
        in_use=lambda: {MODEL: IN_USE},
    )


def coder_spec() -> ServiceSpec:
    coder = Coder()
    return ServiceSpec(
        name="autoencoder",
        settings=ServiceSettings(),
        rpc={"reconstruct": coder.reconstruct},
        start=coder.start,
        models=(AUTOENCODER,),
    )
