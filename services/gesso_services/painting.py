"""Latents to pictures and back, by asking the autoencoder service."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from gesso_contracts import SAFETENSORS, limits
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline, Payload
from gesso_core.errors import Cancelled, Unavailable
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, decode_picture, encode_picture
from gesso_core.pipelines.tensor_bytes import pack_tensors, unpack_tensor
from torch import Tensor

from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
PREVIEW_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """What a picture is painted from: a latent, in the scale of the autoencoder that decodes it.

    The picture is brought to ``height`` x ``width`` pixels.
    """

    autoencoder: str
    latent_CHW: Tensor
    height: int
    width: int


class Painter:
    """Turns sketches into pictures.

    ``timeout_s`` is for one call, ``patience_s`` for an autoencoder that is missing or restarts;
    previews are at most ``preview_side`` pixels long.
    """

    def __init__(
        self, context: ServiceContext, *, timeout_s: float, patience_s: float, preview_side: int
    ) -> None:
        self.context = context
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self.preview_side = preview_side

    async def picture(
        self, sketch: Sketch, output_format: m.ImageFormat, job: JobContext
    ) -> m.LatentDecoded:
        """The finished picture. `Unavailable` when no autoencoder answers within the patience."""
        message = m.DecodeLatent(
            model=sketch.autoencoder,
            latent=await self._packed(sketch.latent_CHW),
            height=sketch.height,
            width=sketch.width,
            output_format=output_format,
        )
        return await self._patiently(lambda: self._decode(message, self.timeout_s), job)

    async def pixels(self, sketch: Sketch, job: JobContext) -> Pixels:
        """The finished picture as pixels, without loss."""
        decoded = await self.picture(sketch, "png", job)
        data = await self.context.blobs.read(decoded.image)
        return await asyncio.to_thread(decode_picture, data)

    async def latent(self, autoencoder: str, pixels_HWC: Pixels, job: JobContext) -> Tensor:
        """The latent (C, h, w) of a picture; waits for an autoencoder as `picture` does."""
        data = await asyncio.to_thread(encode_picture, pixels_HWC)
        image = Inline(data=data, media_type=MEDIA_TYPES["png"])
        message = m.EncodeImage(model=autoencoder, image=image)
        encoded = await self._patiently(lambda: self._encode(message), job)
        return unpack_tensor(await self.context.blobs.read(encoded.latent), "latent")

    async def preview(self, sketch: Sketch) -> bytes:
        """A small WebP picture of what is becoming; asked once."""
        shrink = min(1.0, self.preview_side / max(sketch.height, sketch.width))
        message = m.DecodeLatent(
            model=sketch.autoencoder,
            latent=await self._packed(sketch.latent_CHW),
            height=max(1, round(sketch.height * shrink)),
            width=max(1, round(sketch.width * shrink)),
            output_format="webp",
        )
        decoded = await self._decode(message, PREVIEW_TIMEOUT_S)
        return await self.context.blobs.read(decoded.image)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], job: JobContext) -> T:
        give_up, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            if job.cancelled:
                raise Cancelled(job.id, after=job.step)
            try:
                return await ask()
            except Unavailable as error:
                if time.monotonic() + pause_s > give_up:
                    raise
                log.warning("waiting for the autoencoder: %s", error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _packed(self, latent_CHW: Tensor) -> Payload:
        return await self.context.blobs.pack(
            pack_tensors({"latent": latent_CHW}),
            SAFETENSORS,
            inline_limit=limits.INLINE_RPC_BYTES,
            dtype=str(latent_CHW.dtype).removeprefix("torch."),
            shape=tuple(latent_CHW.shape),
        )

    async def _decode(self, message: m.DecodeLatent, timeout_s: float) -> m.LatentDecoded:
        return await self.context.call(
            "autoencoder", "decode", message, m.LatentDecoded, timeout=timeout_s
        )

    async def _encode(self, message: m.EncodeImage) -> m.ImageEncoded:
        return await self.context.call(
            "autoencoder", "encode", message, m.ImageEncoded, timeout=self.timeout_s
        )
