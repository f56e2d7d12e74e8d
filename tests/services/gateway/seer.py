"""A small real autoregressive service for the tests of the HTTP edge.

It draws row by row what the painter draws, keeps rows of a picture that it is given, makes videos,
and sees: it says how large a picture is and which colour it mostly has, word by word. Its score of
a picture is the share of blue, and it judges by prompts of up to 2000 characters. The words of the
request say how it behaves: "slowly" takes its time, "too large" runs out of memory, "stumbles" says
something, then begins its answer anew, and "hesitates" is long in checking a prompt.
"""

import asyncio

import numpy as np
from gesso_contracts import (
    AnswerTurn,
    CheckJudgement,
    GenerateImage,
    GenerateVideo,
    ImagePart,
    ImageReady,
    ImagesJudged,
    JudgeImages,
    JudgementChecked,
    ModelInUse,
    Provenance,
    TextPart,
    TurnAnswered,
    VaryImage,
    VideoPart,
    VideoReady,
)
from gesso_core.errors import InvalidRequest, OutOfMemory
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, decode_picture, encode_picture
from gesso_core.pipelines.videos import MEDIA_TYPES as VIDEO_TYPES
from gesso_core.pipelines.videos import decode_video, encode_video
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext, ServiceSpec
from gesso_services.runtime.settings import ServiceSettings

DRAWS, SEES, FILMS = "hart-tiny", "vilau-tiny", "vila-u-7b-256"
FOLDER = "from-a-folder"  # no registry has it
IN_USE = ModelInUse(weight_bytes=6_000_000, native_size=128, tasks=["text-to-image"], steps=4)
SLOW_STEP_S = 0.15
ROWS, FRAMES = 4, 5
COLOURS = ("red", "green", "blue")


def gradient(seed: int, width: int, height: int) -> Pixels:
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.full_like(red, seed % 256)], axis=-1).astype(np.uint8)


def provenance(model: str, guidance_scale: float | None) -> Provenance:
    return Provenance(
        model=model,
        revision="shipped",
        weights_sha256="0" * 64,
        sampler="next-scale",
        steps=ROWS,
        guidance_scale=3.0 if guidance_scale is None else guidance_scale,
    )


def colour(pixels: Pixels) -> str:
    return COLOURS[int(pixels.reshape(-1, 3).mean(axis=0).argmax())]


class Seer:
    async def start(self, context: ServiceContext) -> None:
        self.blobs = context.blobs

    async def generate(self, request: GenerateImage, job: JobContext) -> ImageReady:
        return await self._draw(request, job, gradient(request.seed, request.width, request.height))

    async def vary(self, request: VaryImage, job: JobContext) -> ImageReady:
        pixels = gradient(request.seed, request.width, request.height)
        given = decode_picture(await self.blobs.read(request.image))
        kept = min(len(given), len(pixels) * request.keep // ROWS)
        pixels[:kept] = given[:kept, : pixels.shape[1]]
        return await self._draw(request, job, pixels)

    async def film(self, request: GenerateVideo, job: JobContext) -> VideoReady:
        frames = np.stack([gradient(request.seed + i, 64, 32) for i in range(FRAMES)])
        await self._steps(request.prompt, job, request.preview_every, frames[0])
        data = encode_video(frames, request.output_format, frames_per_s=request.frames_per_s)
        return VideoReady(
            video=await self.blobs.put(data, VIDEO_TYPES[request.output_format]),
            frames=FRAMES,
            frames_per_s=request.frames_per_s,
            width=64,
            height=32,
            seed=request.seed,
            provenance=provenance(request.model, request.guidance_scale),
        )

    async def answer(self, request: AnswerTurn, job: JobContext) -> TurnAnswered:
        *_, last = request.turns
        asked = " ".join(part.text for part in last.parts if isinstance(part, TextPart))
        if "too large" in asked:
            raise OutOfMemory("the conversation does not fit; show fewer pictures")
        if len(asked) > 2000:
            raise InvalidRequest("the prompt is longer than the context", field="turns")
        words = (await self._seen(request)).split(" ")
        if "stumbles" in asked:
            job.say("Something else")
        for count in range(1, min(len(words), request.max_tokens) + 1):
            await asyncio.sleep(SLOW_STEP_S if "slowly" in asked else 0.002)
            job.say(" ".join(words[:count]))
        return TurnAnswered(
            text=" ".join(words[: request.max_tokens]),
            finish_reason="stop" if len(words) <= request.max_tokens else "length",
            prompt_tokens=len(asked.split()),
            answer_tokens=min(len(words), request.max_tokens),
        )

    async def check(self, request: CheckJudgement) -> JudgementChecked:
        if "hesitates" in request.prompt:
            await asyncio.sleep(5)
        if len(request.prompt) > 2000:
            raise InvalidRequest("too long for the judge; shorten the prompt", field="prompt")
        return JudgementChecked(tokens=len(request.prompt.split()))

    async def judge(self, request: JudgeImages) -> ImagesJudged:
        if "too large" in request.prompt:
            raise OutOfMemory("the pictures do not fit; judge fewer at once")
        pictures = [decode_picture(await self.blobs.read(image)) for image in request.images]
        return ImagesJudged(scores=[float(pixels[0, 0, 2]) / 255 for pixels in pictures])

    async def _seen(self, request: AnswerTurn) -> str:
        said = []
        for part in (part for turn in request.turns for part in turn.parts):
            if isinstance(part, ImagePart):
                pixels = decode_picture(await self.blobs.read(part.image))
                size = f"{pixels.shape[1]} by {pixels.shape[0]}"
                said.append(f"A picture of {size}, mostly {colour(pixels)}.")
            if isinstance(part, VideoPart):
                frames = decode_video(await self.blobs.read(part.video), 100)
                said.append(f"A video of {len(frames)} frames.")
        return " ".join(said) or f"I see nothing; the seed is {request.seed}."

    async def _draw(self, request: GenerateImage, job: JobContext, pixels: Pixels) -> ImageReady:
        if request.negative_prompt:
            raise InvalidRequest("it avoids nothing; leave it empty", field="negative_prompt")
        await self._steps(request.prompt, job, request.preview_every, pixels)
        return ImageReady(
            image=await self.blobs.put(
                encode_picture(pixels, request.output_format), MEDIA_TYPES[request.output_format]
            ),
            width=request.width,
            height=request.height,
            seed=request.seed,
            provenance=provenance(request.model, request.guidance_scale),
        )

    async def _steps(
        self, prompt: str, job: JobContext, every: int = 0, pixels: Pixels | None = None
    ) -> None:
        for step in range(1, ROWS + 1):
            await asyncio.sleep(SLOW_STEP_S if "slowly" in prompt else 0.002)
            if pixels is not None and every and step % every == 0:
                shown = np.zeros_like(pixels)
                shown[: len(pixels) * step // ROWS] = pixels[: len(pixels) * step // ROWS]
                job.preview(encode_picture(shown, "webp"), step)
            job.report(step, ROWS)


def seer_spec() -> ServiceSpec:
    seer = Seer()
    return ServiceSpec(
        name="autoregressive",
        settings=ServiceSettings(slots=4),
        jobs={
            "generate-image": seer.generate,
            "vary-image": seer.vary,
            "generate-video": seer.film,
            "answer": seer.answer,
        },
        rpc={"judge": seer.judge, "check-judgement": seer.check},
        start=seer.start,
        models=(DRAWS, SEES, FILMS, FOLDER),
        in_use=lambda: {FOLDER: IN_USE},
    )
