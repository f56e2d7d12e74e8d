"""``/label-studio``: the ML-backend protocol of Label Studio, for text in pictures.

Give ``http://<this server>/label-studio`` as the URL of a model. A task is answered with the words
and characters of its picture, by the same jobs as ``/v1/annotations/text``; a click or a box of a
smart tool with what it points at. A task has to carry its picture as a ``data:`` URL: this server
opens no other address, and uses none of the access tokens that Label Studio sends.
"""

import asyncio
import uuid
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from gesso_contracts import (
    AnnotateText,
    JobState,
    PromptSpec,
    Segmented,
    SegmentPrompts,
    TextAnnotated,
    TextLabels,
    limits,
)
from gesso_core.annotate.char_sam.label_studio import pack_brush, regions
from gesso_core.annotate.masks import decode_mask
from gesso_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from gesso_services.annotation_labels import picture_result
from gesso_services.gateway import annotation_door, annotation_results, orders
from gesso_services.gateway.admission import Door
from gesso_services.gateway.auth import basic_caller
from gesso_services.gateway.catalog import Models, Served
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.labeling_config import LabelingConfig, read_config
from gesso_services.gateway.orders import Order
from gesso_services.gateway.problems import documented
from gesso_services.gateway.uploads import (
    INLINE_BYTES_PER_CALL,
    INLINE_BYTES_PER_JOB,
    Intake,
    from_data_url,
)
from gesso_services.runtime import rpc

PATH: Final = "/label-studio"
PREDICT: Final = f"{PATH}/predict"
KIND: Final = "annotate-text"
Caller = Annotated[str, Depends(basic_caller)]
router = APIRouter(prefix=PATH, tags=["label studio"])
ConfigText = Annotated[str, Field(max_length=100_000)]


class Incoming(BaseModel):
    """What Label Studio sends; its versions differ in what more they send."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Setup(Incoming):
    """A project connects to this server."""

    label_config: ConfigText = Field(alias="schema", description="the labelling interface")


class Task(Incoming):
    """One picture to label."""

    id: JsonValue = None
    data: dict[str, JsonValue] = Field(description="the picture as a data: URL")


class Region(Incoming):
    """What a person drew with a smart tool; numbers are percent of the picture."""

    type: str = ""
    value: dict[str, JsonValue] = Field(default_factory=dict)
    is_positive: bool = True


class Context(Incoming):
    """The tools that a person used on the one task."""

    result: list[Region] = Field(default_factory=list, max_length=limits.MAX_POINTS)


class Parameters(Incoming):
    """How to predict."""

    context: Context | None = None


class Predict(Incoming):
    """Tasks that want predictions."""

    tasks: list[Task] = Field(min_length=1, max_length=limits.MAX_LIST)
    label_config: ConfigText
    params: Parameters | None = None


class Health(BaseModel):
    """The protocol's word for: alive."""

    status: Literal["UP"] = "UP"
    model_class: str = "gesso"


class ModelVersion(BaseModel):
    """Under which name predictions are kept."""

    model_version: str


class Prediction(BaseModel):
    """The regions of one task."""

    model_version: str
    score: float
    result: list[dict[str, JsonValue]]


class Predictions(ModelVersion):
    """One prediction per task, in their order."""

    results: list[Prediction]


@router.get("/health")
async def health() -> Health:
    """This server answers."""
    return Health()


@router.post("/setup", responses=documented(400, 401, 404, 413, 422, 429, 500, 503))
async def setup(_: Caller, body: Setup, models: Models) -> ModelVersion:
    """Refuse a labelling interface that could not show masks; 422 says what it needs."""
    read_config(body.label_config, "schema")
    return ModelVersion(model_version=(await models.find(KIND, None)).name)


@router.post(
    "/predict",
    response_model=Predictions,
    responses=documented(400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507),
)
async def predict(
    caller: Caller, body: Predict, request: Request, fabric: Here, models: Models, door: Door
) -> Any:
    """Label the pictures of all tasks; with `params.context`, cut out what the tools point at."""
    config = read_config(body.label_config, "label_config")
    with door.place(caller):
        if body.params and body.params.context and body.params.context.result:
            return await _pointed_at(body, body.params.context, config, fabric, models)
        served = await models.find(KIND, None)
        if not config.labels & {"word", "character"}:
            return _predictions(served, [[] for _ in body.tasks])
        async with door.admitted(served.service, len(body.tasks)):
            order = await _order(body, config, served, fabric)
        states = await orders.while_connected(request, orders.fulfil(fabric, order))
        if states is None:
            return Response(status_code=499)
        found = [await _regions(fabric, state, config) for state in states]
        return _predictions(served, found)


async def _order(
    body: Predict, config: LabelingConfig, served: Served, fabric: Fabric
) -> Order[AnnotateText]:
    name, pictures = f"label-{uuid.uuid4().hex}", []
    for index, task in enumerate(body.tasks):
        intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB)
        field = f"tasks.{index}.data.{config.key}"
        pictures.append(await intake.picture(_picture(task, config, field), field))
    jobs = tuple(
        (f"{name}-{index}", AnnotateText(model=served.name, image=picture))
        for index, picture in enumerate(pictures)
    )
    return Order(service=served.service, kind=KIND, jobs=jobs, lasting=False)


def _picture(task: Task, config: LabelingConfig, field: str) -> bytes:
    address = task.data.get(config.key)
    if not isinstance(address, str):
        raise InvalidRequest(
            f"the task has no text under {config.key!r}, where the labelling interface looks for "
            "its picture; send a base64 data: URL",
            field=field,
        )
    return from_data_url(address, field)


async def _regions(fabric: Fabric, state: JobState, config: LabelingConfig) -> list[dict[str, Any]]:
    made = orders.result_of(state, TextAnnotated)
    labels = await annotation_results.labels_of(fabric, made.labels, TextLabels)
    return await asyncio.to_thread(_drawn, labels, config)


def _drawn(labels: TextLabels, config: LabelingConfig) -> list[dict[str, Any]]:
    """The regions whose label the project has."""
    found = regions(
        picture_result(labels),
        shape=config.shape,
        from_name=config.from_name,
        to_name=config.to_name,
    )
    return [one for one in found if set(one["value"][one["type"]]) <= config.labels]


async def _pointed_at(
    body: Predict, context: Context, config: LabelingConfig, fabric: Fabric, models: Models
) -> Predictions:
    """A brush region for the clicks and boxes of a person, on the first task."""
    if config.shape != "brush":
        raise InvalidRequest(
            "a smart tool is answered with a brush mask, and the labelling interface has no "
            "BrushLabels on the picture; add them",
            field="label_config",
        )
    served = await models.find("segment", None)
    field = f"tasks.0.data.{config.key}"
    data = _picture(body.tasks[0], config, field)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_CALL)
    size = await intake.measure(data, field)
    prompt = _prompt(context, size)
    annotation_door.check_prompts([prompt], size, "params.context.result")
    question = SegmentPrompts(
        model=served.name, image=await intake.pack_picture(data, field), prompts=[prompt]
    )
    made = await rpc.call(
        fabric.bus,
        served.service,
        "segment",
        question,
        Segmented,
        timeout=fabric.settings.deadline_s,
    )
    region = await asyncio.to_thread(_brush, made, _label(context, config), config)
    return _predictions(served, [[region]])


def _prompt(context: Context, size: tuple[int, int]) -> PromptSpec:
    """All tools of one person as one prompt: key points, and at most one rectangle."""
    height, width = size
    points: list[tuple[float, float]] = []
    signs: list[Literal[0, 1]] = []
    box = None
    for index, region in enumerate(context.result):
        field = f"params.context.result.{index}.value"
        x, y = (_percent(region, side, field) for side in "xy")
        x, y = x * width / 100, y * height / 100
        if region.type.startswith("rectangle"):
            wide, high = (_percent(region, side, field) for side in ("width", "height"))
            box = (x, y, x + max(wide * width / 100, 1), y + max(high * height / 100, 1))
        else:
            points.append((x, y))
            signs.append(1 if region.is_positive else 0)
    return PromptSpec(box=box, points=points, labels=signs)


def _percent(region: Region, side: str, field: str) -> float:
    value = region.value.get(side)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InvalidRequest(
            f"{side} is {value!r}; a smart tool gives percent of the picture, 0 to 100",
            field=f"{field}.{side}",
        )
    return float(value)


def _label(context: Context, config: LabelingConfig) -> list[str]:
    """The label that the person chose, where the brush has it."""
    chosen = context.result[0].value.get(context.result[0].type)
    labels = chosen if isinstance(chosen, list) else []
    return [label for label in labels if isinstance(label, str) and label in config.labels][:1]


def _brush(made: Segmented, label: list[str], config: LabelingConfig) -> dict[str, Any]:
    found = made.masks[0]
    mask_HW = decode_mask({"size": list(found.mask.size), "counts": found.mask.counts})
    return {
        "id": uuid.uuid4().hex[:10],
        "type": "brushlabels",
        "from_name": config.from_name,
        "to_name": config.to_name,
        "original_width": made.width,
        "original_height": made.height,
        "image_rotation": 0,
        "score": found.predicted_iou,
        "value": {"format": "rle", "rle": pack_brush(mask_HW), "brushlabels": label},
    }


def _predictions(served: Served, found: list[list[dict[str, Any]]]) -> Predictions:
    """Scores are those of the least sure region: that task wants a person first."""
    return Predictions(
        model_version=served.name,
        results=[
            Prediction(
                model_version=served.name,
                score=min((float(region["score"]) for region in drawn), default=0.0),
                result=drawn,
            )
            for drawn in found
        ],
    )
