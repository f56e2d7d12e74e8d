"""Jobs and calls about what is seen: answers in a conversation, and judgements of pictures."""

import asyncio
import uuid

import numpy as np
from gesso_contracts import conversations as c
from gesso_contracts.blobs import Payload
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.videos import decode_video
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerDraft, AnswerOptions, Part, Utterance, Video
from gesso_core.pipelines.vila_u_room import answering_bytes, judging_bytes

from gesso_services.autoregressive_models import seeing
from gesso_services.autoregressive_workshop import Workshop
from gesso_services.runtime.job_context import JobContext


class Seeing:
    """Handlers for a model that sees."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    async def answer(self, request: c.AnswerTurn, job: JobContext) -> c.TurnAnswered:
        """The next turn of a conversation; its words are told as they come."""
        model = seeing(self.workshop.model(request.model))
        conversation = [
            Utterance(
                role=turn.role,
                parts=tuple([await self._part(model, part) for part in turn.parts]),
            )
            for turn in request.turns
        ]
        options = AnswerOptions(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=tuple(request.stop),
        )
        need = await self.workshop.aside(answering_bytes, model, conversation, options)
        what = f"an answer of {model.entry.name}"
        async with self.workshop.room.reserved(need, job, what=what):
            draft = await self.workshop.aside(model.begin_answer, conversation, options)
            said = await self._said(model, draft, job)
        assert said.finish_reason is not None
        return c.TurnAnswered(
            text=said.text,
            finish_reason=said.finish_reason,
            prompt_tokens=said.prompt_tokens,
            answer_tokens=said.answer_tokens,
        )

    async def check_judgement(self, request: c.CheckJudgement) -> c.JudgementChecked:
        """Whether the model can judge by the prompt; InvalidRequest says why not."""
        model = seeing(self.workshop.model(request.model))
        question = await self.workshop.aside(model.judging.question, request.prompt)
        return c.JudgementChecked(tokens=question.tokens)

    async def judge(self, request: c.JudgeImages) -> c.ImagesJudged:
        """How well each picture shows what the prompt asks for."""
        model = seeing(self.workshop.model(request.model))
        pictures = [
            await self._seen(model, image, f"images.{index}")
            for index, image in enumerate(request.images)
        ]
        need = judging_bytes(model, len(pictures), request.prompt)
        # A call has no job that could be withdrawn.
        call = JobContext(f"judge-{uuid.uuid4().hex[:12]}")
        what = f"a judgement of {len(pictures)} pictures"
        async with self.workshop.room.reserved(need, call, what=what):
            scores = await self.workshop.aside(model.judge, pictures, request.prompt)
        return c.ImagesJudged(scores=scores)

    async def _said(self, model: VilaUPipeline, draft: AnswerDraft, job: JobContext) -> AnswerDraft:
        told = ""

        def on_step(draft: AnswerDraft) -> None:
            nonlocal told
            job.report(draft.steps_done, draft.total_steps)
            if draft.text != told:
                told = draft.text
                job.say(told)

        return await self.workshop.finish(model.chat, draft, job, on_step=on_step)

    async def _part(self, model: VilaUPipeline, part: c.Part) -> Part:
        if isinstance(part, c.TextPart):
            return part.text
        if isinstance(part, c.ImagePart):
            return await self._seen(model, part.image, "messages")
        return await self._video(model, part)

    async def _seen(self, model: VilaUPipeline, image: Payload, field: str) -> Pixels:
        """A picture as the model looks at it: many large ones would fill the memory."""
        pixels = await self.workshop.opened(image, field)
        return await asyncio.to_thread(model.prompter.fitted, pixels)

    async def _video(self, model: VilaUPipeline, part: c.VideoPart) -> Video:
        data = await self.workshop.blobs.read(part.video)
        most = max(1, model.model.config.video_frames)
        frames = await asyncio.to_thread(decode_video, data, most)
        return Video(np.stack([await asyncio.to_thread(model.prompter.fitted, f) for f in frames]))
