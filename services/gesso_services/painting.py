"""Latents to pictures, by asking the autoencoder service."""

import asyncio
import logging
import time

from gesso_contracts import SAFETENSORS, limits
from gesso_contracts import messages as m
from gesso_contracts.blobs import Payload
from gesso_core.errors import Cancelled, Unavailable
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.tensor_bytes import pack_tensors
from torch import Tensor

from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
PREVIEW_TIMEOUT_S = 5.0


class Painter:
    """Turns drafts into pictures.

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
        self, denoiser: Denoiser, draft: Draft, output_format: m.ImageFormat, job: JobContext
    ) -> m.LatentDecoded:
        """The finished picture. `Unavailable` when no autoencoder answers within the patience."""
        recipe = draft.recipe
        message = m.DecodeLatent(
            model=denoiser.autoencoder,
            latent=await self._packed(denoiser, draft.result),
            height=recipe.height,
            width=recipe.width,
            output_format=output_format,
        )
        give_up, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            if job.cancelled:
                raise Cancelled(job.id, after=draft.steps_done)
            try:
                return await self._decode(message, self.timeout_s)
            except Unavailable as error:
                if time.monotonic() + pause_s > give_up:
                    raise
                log.warning("waiting for the autoencoder: %s", error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def preview(self, denoiser: Denoiser, draft: Draft) -> bytes:
        """A small WebP picture of what the draft is becoming; asked once."""
        assert draft.denoised_CHW is not None
        recipe = draft.recipe
        shrink = min(1.0, self.preview_side / max(recipe.height, recipe.width))
        message = m.DecodeLatent(
            model=denoiser.autoencoder,
            latent=await self._packed(denoiser, draft.denoised_CHW),
            height=max(1, round(recipe.height * shrink)),
            width=max(1, round(recipe.width * shrink)),
            output_format="webp",
        )
        decoded = await self._decode(message, PREVIEW_TIMEOUT_S)
        return await self.context.blobs.read(decoded.image)

    async def _packed(self, denoiser: Denoiser, latent_CHW: Tensor) -> Payload:
        return await self.context.blobs.pack(
            pack_tensors({"latent": denoiser.unscaled(latent_CHW)}),
            SAFETENSORS,
            inline_limit=limits.INLINE_RPC_BYTES,
            dtype="float32",
            shape=tuple(latent_CHW.shape),
        )

    async def _decode(self, message: m.DecodeLatent, timeout_s: float) -> m.LatentDecoded:
        return await self.context.call(
            "autoencoder", "decode", message, m.LatentDecoded, timeout=timeout_s
        )
