"""Jobs that draw: pictures from words, pictures from pictures, short videos."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from gesso_contracts import messages as m
from gesso_contracts.blobs import Payload
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.draw import Draws, made_by
from gesso_core.pipelines.pictures import Pixels, covering
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.videos import MEDIA_TYPES, encode_video
from torch import Tensor

from gesso_services.autoregressive_models import drawing_bytes, seeing, sees
from gesso_services.autoregressive_workshop import Workshop
from gesso_services.painting import Sketch
from gesso_services.previews import Previews
from gesso_services.provenance import provenance_message
from gesso_services.runtime.job_context import JobContext
from gesso_services.wishes import wish_of


class Drawing:
    """Handlers of the jobs that draw."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    async def generate_image(self, request: m.GenerateImage, job: JobContext) -> m.ImageReady:
        """Text to picture."""
        model = self.workshop.model(request.model)
        recipe = model.recipe(wish_of(request))
        return await self._picture(model, recipe, None, request, job)

    async def vary_image(self, request: m.VaryImage, job: JobContext) -> m.ImageReady:
        """A picture that keeps the first scales or rows of another, or was drawn looking at it."""
        model = self.workshop.model(request.model)
        looks = request.keep == 0
        if looks and not sees(model):
            raise InvalidRequest(
                f"{model.entry.name} goes on from a picture but sees none; keep at least 1 of its "
                "scales",
                field="keep",
            )
        recipe = model.recipe(wish_of(request, keep=None if looks else request.keep))
        start = await self._start(model, recipe, request.image, job)
        return await self._picture(model, recipe, start, request, job)

    async def generate_video(self, request: m.GenerateVideo, job: JobContext) -> m.VideoReady:
        """Text to a short video: its frames are drawn one after another, in one stream."""
        model = seeing(self.workshop.model(request.model))
        recipe = model.video_recipe(_video_wish(request, model.entry.native_size))
        async with self._previews(model, job, request.preview_every) as previews:
            latents = await self._drawn(model, recipe, None, job, previews, model.frames)
            sketches = [_sketch(model, recipe, latent) for latent in latents]
            frames = np.stack([await self.workshop.painter.pixels(one, job) for one in sketches])
        data = await asyncio.to_thread(
            encode_video, frames, request.output_format, frames_per_s=request.frames_per_s
        )
        made = await self.workshop.aside(made_by, model, recipe)
        count, height, width = frames.shape[:3]
        return m.VideoReady(
            video=await self.workshop.blobs.put(data, MEDIA_TYPES[request.output_format]),
            frames=count,
            frames_per_s=request.frames_per_s,
            width=width,
            height=height,
            seed=recipe.seed,
            provenance=provenance_message(made),
        )

    async def _picture(
        self,
        model: Draws,
        recipe: Any,
        start: Pixels | Tensor | None,
        request: m.GenerateImage,
        job: JobContext,
    ) -> m.ImageReady:
        async with self._previews(model, job, request.preview_every) as previews:
            latent_CHW = await self._drawn(model, recipe, start, job, previews, model.latent)
            sketch = _sketch(model, recipe, latent_CHW)
            decoded = await self.workshop.painter.picture(sketch, request.output_format, job)
        made = await self.workshop.aside(made_by, model, recipe)
        return m.ImageReady(
            image=await self.workshop.blobs.laid_down(decoded.image),
            width=decoded.width,
            height=decoded.height,
            seed=recipe.seed,
            provenance=provenance_message(made),
        )

    async def _drawn(
        self,
        model: Draws,
        recipe: Any,
        start: Pixels | Tensor | None,
        job: JobContext,
        previews: Previews[Any],
        result: Callable[[Any], Any],
    ) -> Any:
        """The ``result`` of the finished draft; its keys and values are gone when this returns."""
        need = drawing_bytes(model, recipe, shown=start is not None)
        async with self.workshop.room.reserved(need, job, what=f"a drawing of {model.entry.name}"):
            draft = await self.workshop.aside(model.begin, recipe, start)

            def on_step(draft: Any) -> None:
                job.report(draft.steps_done, draft.total_steps)
                previews.offer(draft)

            return result(await self.workshop.finish(model, draft, job, on_step=on_step))

    async def _start(
        self, model: Draws, recipe: Any, image: Payload, job: JobContext
    ) -> Pixels | Tensor:
        """A picture as its model takes it: small pixels for one that sees, otherwise a latent."""
        given = await self.workshop.opened(image, "image")
        if sees(model):
            return await asyncio.to_thread(seeing(model).prompter.fitted, given)
        fitted = await asyncio.to_thread(covering, given, *recipe.model_size)
        return await self.workshop.painter.latent(model.autoencoder, fitted, job)

    def _previews(self, model: Draws, job: JobContext, every: int) -> Previews[Any]:
        """Shows drafts of ``model`` until the finished picture is painted."""

        def sketch(draft: Any) -> Sketch:
            return _sketch(model, draft.recipe, model.latent(draft))

        return Previews(sketch, self.workshop.painter.preview, job, every=every)


def _sketch(model: Draws, recipe: Any, latent_CHW: Tensor) -> Sketch:
    return Sketch(
        autoencoder=model.autoencoder,
        latent_CHW=latent_CHW,
        height=recipe.height,
        width=recipe.width,
    )


def _video_wish(request: m.GenerateVideo, side: int) -> GenerationRequest:
    return GenerationRequest(
        prompt=request.prompt,
        width=side,
        height=side,
        seed=request.seed,
        guidance_scale=request.guidance_scale,
        top_k=request.top_k,
        top_p=request.top_p,
    )
