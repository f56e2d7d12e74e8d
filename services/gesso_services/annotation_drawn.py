"""Jobs of the kind ``draw-signs``: drawn by the diffusion service, written on and labelled here.

Every picture is a job of the diffusion service whose id is made from this job's, so that a job that
is given to another worker joins what its first worker has begun, and nothing is drawn twice. A few
pictures are drawn ahead of the one that is being labelled. A withdrawn or failed job withdraws
them; one that waits for a missing part leaves them, because it will come back.
"""

import asyncio
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass

from gesso_contracts import annotations as a
from gesso_contracts import messages as m
from gesso_contracts.jobs import JobState
from gesso_core.annotate.char_sam.overlay import overlay
from gesso_core.annotate.char_sam.pipeline import CharSamOptions
from gesso_core.annotate.char_sam.signs import Sign, check_texts, compose, enlarged
from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.char_sam.writers import values_png
from gesso_core.annotate.masks import overlap
from gesso_core.errors import Cancelled, Conflict, GessoError, Unavailable
from gesso_core.pipelines.pictures import MEDIA_TYPES, decode_picture, encode_picture

from gesso_services.annotation_labels import text_labels, text_summary
from gesso_services.annotation_text import JSON, annotate_words
from gesso_services.annotation_workshop import TEXT, Workshop
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.problems import error_of
from gesso_services.runtime.service import ServiceContext

SERVICE, KIND = "diffusion", "generate-image"
AHEAD = 4  # pictures that are drawn at once
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
PNG = MEDIA_TYPES["png"]
# How fields of the picture's job are called in this one.
FIELDS = {"model": "generator", "width": "drawn_width", "height": "drawn_height"}


@dataclass(frozen=True, eq=False)
class _Labelled:
    """A sign and what Char-SAM says of it, with the files of both."""

    sign: Sign
    result: PictureResult
    image: bytes
    labels: bytes
    overlay: bytes
    truth: bytes


class SignDrawing:
    """The handler; everything heavy runs in a thread of the jobs."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    async def open(self, context: ServiceContext) -> None:
        """Find the book of jobs."""
        self.jobs = await JobStore.open(context.bus)

    async def draw(self, request: a.DrawSigns, job: JobContext) -> a.SignsDrawn:
        """Pictures with labelled signs."""
        self.workshop.check_model(request.model, TEXT)
        await self.workshop.for_job(self._check, request)
        order = [
            (picture_id(job.id, number), _picture(request, number))
            for number in range(request.pictures)
        ]
        try:
            return await self._fulfilled(request, order, job)
        except Unavailable:
            raise
        except GessoError:
            await self._withdraw([job_id for job_id, _ in order])
            raise

    async def _fulfilled(
        self, request: a.DrawSigns, order: list[tuple[str, m.GenerateImage]], job: JobContext
    ) -> a.SignsDrawn:
        signs: list[a.DrawnSign] = []
        for number, (job_id, _) in enumerate(order):
            begun = number + AHEAD - 1 if number else 0
            for ahead_id, message in order[begun : number + AHEAD]:
                await self.jobs.submit(SERVICE, KIND, message, job_id=ahead_id)
            drawn = await self._drawn(job_id, job)
            data = await self.workshop.blobs.get(drawn.image)
            made = await self.workshop.for_job(self._labelled, data, request, number, job)
            signs.append(await self._laid_down(made, job_id, drawn.seed))
        return a.SignsDrawn(
            width=request.width,
            height=request.height,
            words=request.words,
            pictures=signs,
            agreement=sum(sign.agreement for sign in signs) / len(signs),
            generator=drawn.provenance,
            provenance=self.workshop.provenance(TEXT),
        )

    async def _drawn(self, job_id: str, job: JobContext) -> m.ImageReady:
        """What the picture's job made. `Unavailable` when nothing happens to it for too long."""
        state = await self.jobs.get(job_id)
        patience_s, pause_s = self.workshop.settings.drawing_patience_s, FIRST_PAUSE_S
        give_up = time.monotonic() + patience_s
        while not state.is_final:
            await _pause(job, pause_s)
            before, pause_s = state, min(1.5 * pause_s, LONGEST_PAUSE_S)
            with suppress(Unavailable):
                state = await self.jobs.get(job_id)
            if state != before:
                give_up = time.monotonic() + patience_s
            elif time.monotonic() > give_up:
                raise Unavailable(
                    f"the picture {job_id!r} has been {state.status} for {patience_s:g} s; is the "
                    "diffusion service running?"
                )
        return _made(state)

    async def _withdraw(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            with suppress(GessoError):  # it may never have been accepted
                await self.jobs.cancel(job_id)

    async def _laid_down(self, made: _Labelled, job_id: str, seed: int) -> a.DrawnSign:
        put = self.workshop.blobs.put
        return a.DrawnSign(
            name=f"{made.sign.scene.name}.png",
            seed=seed,
            drawn_by=job_id,
            image=await put(made.image, PNG),
            labels=await put(made.labels, JSON),
            overlay=await put(made.overlay, PNG),
            truth=await put(made.truth, PNG),
            agreement=overlap(made.result.mask(), made.sign.scene.values_HW > 0).iou,
            summary=text_summary(made.result),
        )

    def _check(self, request: a.DrawSigns) -> None:
        """Whatever would fail later is said before anything is drawn."""
        self.workshop.annotator()
        size = (request.height, request.width)
        check_texts(request.words, size, fonts=self.workshop.settings.fonts)

    def _labelled(
        self, data: bytes, request: a.DrawSigns, number: int, job: JobContext
    ) -> _Labelled:
        """Compose and annotate a picture; every word is a step, and so is the drawing."""
        steps = len(request.words) + 1

        def report(word: int, _: int) -> None:
            job.report(number * steps + 1 + word, request.pictures * steps)

        sign = compose(
            enlarged(decode_picture(data), (request.height, request.width)),
            request.words,
            seed=request.seed + number,
            fonts=self.workshop.settings.fonts,
            name=f"sign-{request.seed + number}",
        )
        options = CharSamOptions(refine=request.refine, min_score=request.min_score)
        picture = sign.scene.picture_HW3
        result = annotate_words(
            self.workshop.annotator(), picture, sign.scene.words, options, report
        )
        return _Labelled(
            sign=sign,
            result=result,
            image=encode_picture(picture),
            labels=text_labels(result).model_dump_json().encode(),
            overlay=encode_picture(overlay(picture, result)),
            truth=values_png(sign.scene.values_HW),
        )


def picture_id(job_id: str, number: int) -> str:
    """The id of the job that draws picture ``number`` of a job."""
    return f"sign-{hashlib.sha256(f'{job_id} {number}'.encode()).hexdigest()[:40]}"


def _picture(request: a.DrawSigns, number: int) -> m.GenerateImage:
    return m.GenerateImage(
        model=request.generator,
        prompt=request.prompt,
        width=request.drawn_width,
        height=request.drawn_height,
        seed=request.seed + number,
    )


async def _pause(job: JobContext, seconds: float) -> None:
    """Wait; raises `Cancelled` as soon as the job is withdrawn."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await job.wait_cancelled()
    if job.cancelled:
        raise Cancelled(job.id, after=job.step)


def _made(state: JobState) -> m.ImageReady:
    """The result of a final job; raises what it failed with, by the name of the field here."""
    if state.problem is not None:
        error = error_of(state.problem)
        error.field = FIELDS.get(error.field or "", error.field)
        raise error
    if state.status != "succeeded":
        raise Conflict(f"the picture {state.id!r} was withdrawn by somebody; ask under a new id")
    return m.ImageReady.model_validate(state.result)
