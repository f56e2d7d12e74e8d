"""The autoregressive service: pictures, short videos and answers, made token by token.

A job's way: what it shows is opened and its prompt read in one thread, it is drawn step by step in
the thread of the step batcher (a scale of a HART, a row of a VILA-U, a few words of an answer), and
pictures are decoded by the autoencoder service. Keys and values of all that is under way share a
bounded room: what does not fit waits for its turn.
"""

import asyncio
import logging

import torch
from gesso_contracts import conversations as c
from gesso_contracts import limits
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_core.pipelines.draw import Draws
from gesso_core.pipelines.pictures import MEDIA_TYPES, blank_picture, encode_picture

from gesso_services.autoregressive_drawing import Drawing
from gesso_services.autoregressive_models import load, sees
from gesso_services.autoregressive_seeing import Seeing
from gesso_services.autoregressive_workshop import AutoregressiveSettings, Workshop
from gesso_services.provenance import in_use
from gesso_services.runtime.service import ServiceContext, ServiceSpec

__all__ = ["AutoregressiveService", "AutoregressiveSettings", "build_service"]

log = logging.getLogger(__name__)


class AutoregressiveService:
    """One replica: every model of its settings, in memory, and one step batcher for all."""

    def __init__(self, settings: AutoregressiveSettings) -> None:
        self.settings = settings
        self.workshop = Workshop(settings)
        self.drawing = Drawing(self.workshop)
        self.seeing = Seeing(self.workshop)

    def in_use(self) -> dict[str, m.ModelInUse]:
        """How the loaded models compute, and what they take."""
        models = self.workshop.models
        return {name: in_use(model.entry, model.identity) for name, model in models.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What is served."""
        return (*self.settings.models, *self.settings.folders)

    async def start(self, context: ServiceContext) -> None:
        """Load every model and start the thread of the steps."""
        for name in self.names:
            model = await asyncio.to_thread(self._load, name)
            self.workshop.models[name] = model
            about = in_use(model.entry, model.identity)
            context.metrics.model_loaded(name, about.quantization, about.weight_bytes)
            log.info("%s is loaded: weights %.1f MB", name, about.weight_bytes / 1e6)
        self.workshop.open(context)

    async def warm_up(self, context: ServiceContext) -> None:
        """A picture by every model, and an answer and a judgement by those that see."""
        for name, model in self.workshop.models.items():
            side = max(limits.MIN_SIDE, model.entry.native_size)
            wish = m.GenerateImage(
                model=name, prompt="a red apple", width=side, height=side, seed=0
            )
            await self.drawing.generate_image(wish, context.trial_job())
            if sees(model):
                await self._look(name, context)

    async def stop(self) -> None:
        """Let go of the threads."""
        self.workshop.close()

    async def _look(self, name: str, context: ServiceContext) -> None:
        image = Inline(data=encode_picture(blank_picture(64, 64)), media_type=MEDIA_TYPES["png"])
        parts: list[c.Part] = [c.ImagePart(image=image), c.TextPart(text="what is this?")]
        asked = c.AnswerTurn(model=name, turns=[c.Turn(role="user", parts=parts)], max_tokens=4)
        await self.seeing.answer(asked, context.trial_job())
        await self.seeing.judge(c.JudgeImages(model=name, prompt="a red apple", images=[image]))

    def _load(self, name: str) -> Draws:
        settings = self.settings
        return load(
            settings.folders.get(name, name),
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
            device=settings.device,
            store=settings.store,
            name=name,
        )


def build_service(settings: AutoregressiveSettings | None = None) -> ServiceSpec:
    """The service as the runtime hosts it."""
    service = AutoregressiveService(
        settings or AutoregressiveSettings.for_service("autoregressive")
    )
    return ServiceSpec(
        name="autoregressive",
        settings=service.settings,
        rpc={"judge": service.seeing.judge, "check-judgement": service.seeing.check_judgement},
        jobs={
            "generate-image": service.drawing.generate_image,
            "vary-image": service.drawing.vary_image,
            "generate-video": service.drawing.generate_video,
            "answer": service.seeing.answer,
        },
        start=service.start,
        warm_up=service.warm_up,
        stop=service.stop,
        models=service.names,
        in_use=service.in_use,
    )
