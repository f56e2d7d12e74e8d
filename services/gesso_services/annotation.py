"""The annotation service: clicks to masks, words to characters, cars to boxes in space, and signs
that are drawn to be labelled.

Jobs run in threads of their own and clicks in another, so that the event loop stays free and a
click never waits for a job. Without the segmenter's files the service starts, says what is missing,
and takes up its work as soon as they are there.
"""

from gesso_contracts import annotations as a
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_core.annotate.masks import box_of_mask
from gesso_core.annotate.segmenter.contract import Masks, Prompt
from gesso_core.annotate.segmenter.crops import segment
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, blank_picture, encode_picture
from gesso_core.registry import MODELS

from gesso_services.annotation_cars import CarAnnotation
from gesso_services.annotation_drawn import SignDrawing
from gesso_services.annotation_labels import whole_code
from gesso_services.annotation_text import TextAnnotation
from gesso_services.annotation_workshop import TEXT, AnnotationSettings, Workshop
from gesso_services.runtime.service import ServiceContext, ServiceSpec

__all__ = ["AnnotationService", "AnnotationSettings", "build_service"]

NATIVE_SIDE = 1024  # of the pictures that a segmenter looks at


class AnnotationService:
    """One replica: a segmenter, and the two ways to annotate with it."""

    def __init__(self, settings: AnnotationSettings) -> None:
        self.settings = settings
        self.workshop = Workshop(settings)
        self.text = TextAnnotation(self.workshop)
        self.cars = CarAnnotation(self.workshop)
        self.signs = SignDrawing(self.workshop)

    async def start(self, context: ServiceContext) -> None:
        """Load the segmenter if it is there."""
        await self.workshop.open(context)
        await self.signs.open(context)

    async def warm_up(self, context: ServiceContext) -> None:
        """A click and a word on an empty picture, if there is a segmenter."""
        if not self.workshop.is_equipped:
            return
        image = Inline(data=encode_picture(blank_picture(64, 96)), media_type=MEDIA_TYPES["png"])
        click = a.PromptSpec(points=[(48.0, 32.0)], labels=[1])
        model = self.settings.segmenter
        await self.segment(a.SegmentPrompts(model=model, image=image, prompts=[click]))
        word = a.WordSpec(text="A", polygon=[(8, 8), (40, 8), (40, 56), (8, 56)])
        await self.text.annotate(
            a.AnnotateText(model=TEXT, image=image, words=[word]), context.trial_job()
        )

    async def stop(self) -> None:
        """Let go of the threads."""
        self.workshop.close()

    async def segment(self, request: a.SegmentPrompts) -> a.Segmented:
        """One mask per prompt."""
        self.workshop.check_model(request.model, self.settings.segmenter)
        picture = await self.workshop.opened(request.image)
        return await self.workshop.for_click(self._segment, picture, request)

    def in_use(self) -> dict[str, m.ModelInUse]:
        """What each model is for, once there is a segmenter."""
        if not self.workshop.is_equipped:
            return {}
        return {name: self._about(name) for name in self.workshop.names}

    def _segment(self, picture: Pixels, request: a.SegmentPrompts) -> a.Segmented:
        segmenter = self.workshop.segmenter()
        prompts = [
            Prompt(box=one.box, points=tuple(one.points), labels=tuple(one.labels))
            for one in request.prompts
        ]
        found: dict[int, a.SegmentedMask] = {}
        for places, masks in segment(segmenter, picture, prompts, multimask=request.multimask):
            found |= zip(places, _messages(masks), strict=True)
        height, width = picture.shape[:2]
        return a.Segmented(
            masks=[found[place] for place in range(len(prompts))],
            width=width,
            height=height,
            cached=segmenter.looks == 0,
        )

    def _about(self, name: str) -> m.ModelInUse:
        tasks = MODELS[name].tasks if name in MODELS else ("segmentation",)
        return m.ModelInUse(
            weight_bytes=self.workshop.weight_bytes(name),
            native_size=NATIVE_SIDE,
            tasks=list(tasks),
        )


def _messages(masks: Masks) -> list[a.SegmentedMask]:
    return [
        a.SegmentedMask(
            mask=whole_code(mask),
            box=box_of_mask(mask),
            area=int(mask.sum()),
            predicted_iou=float(iou),
            stability=float(stability),
        )
        for mask, iou, stability in zip(
            masks.masks_PHW, masks.predicted_iou_P, masks.stability_P, strict=True
        )
    ]


def build_service(settings: AnnotationSettings | None = None) -> ServiceSpec:
    """The service as the runtime hosts it."""
    service = AnnotationService(settings or AnnotationSettings.for_service("annotation"))
    return ServiceSpec(
        name="annotation",
        settings=service.settings,
        rpc={"segment": service.segment},
        jobs={
            "annotate-text": service.text.annotate,
            "annotate-cars": service.cars.annotate,
            "draw-signs": service.signs.draw,
        },
        start=service.start,
        warm_up=service.warm_up,
        stop=service.stop,
        models=service.workshop.names,
        in_use=service.in_use,
        missing=service.workshop.missing,
    )
