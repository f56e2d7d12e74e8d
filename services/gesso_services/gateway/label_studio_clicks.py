"""Smart tools of Label Studio: what a person points at, cut out as a brush region."""

import asyncio
import uuid
from typing import Any, Literal

from gesso_contracts import PromptSpec, Segmented, SegmentPrompts, limits
from gesso_core.annotate.char_sam.label_studio import common_fields, pack_brush
from gesso_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from gesso_services.annotation_labels import placed_mask
from gesso_services.gateway import annotation_door
from gesso_services.gateway.catalog import Served
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.labeling_config import Control, LabelingConfig
from gesso_services.gateway.uploads import INLINE_BYTES_PER_CALL, Intake
from gesso_services.runtime import rpc


class Incoming(BaseModel):
    """What Label Studio sends; its versions differ in what more they send."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Drawn(Incoming):
    """What a person drew with a smart tool; numbers are percent of the picture."""

    type: str = ""
    value: dict[str, JsonValue] = Field(default_factory=dict)
    is_positive: bool = True


class Context(Incoming):
    """The tools that a person used on the one task."""

    result: list[Drawn] = Field(default_factory=list, max_length=limits.MAX_POINTS)


async def cut_out(
    data: bytes,
    field: str,
    context: Context,
    config: LabelingConfig,
    served: Served,
    fabric: Fabric,
) -> dict[str, Any]:
    """The brush region for everything that a person drew on the picture in ``data``."""
    label = _label(context)
    control = config.brush_for(label)
    if control is None:
        raise InvalidRequest(
            "a smart tool is answered with a brush mask, and the labelling interface has no "
            "BrushLabels on the picture; add them",
            field="label_config",
        )
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_CALL)
    size = await intake.measure(data, field)
    prompt = _prompt(context, size)
    annotation_door.check_prompts([prompt], size, "params.context.result")
    image = await intake.pack_picture(data, field)
    question = SegmentPrompts(model=served.name, image=image, prompts=[prompt])
    made = await rpc.call(
        fabric.bus,
        served.service,
        "segment",
        question,
        Segmented,
        timeout=fabric.settings.deadline_s,
    )
    return await asyncio.to_thread(_brush, made, label, control, config.to_name)


def _prompt(context: Context, size: tuple[int, int]) -> PromptSpec:
    """All that a person drew as one prompt: the key points, and the rectangle drawn last."""
    height, width = size
    points: list[tuple[float, float]] = []
    signs: list[Literal[0, 1]] = []
    box = None
    for index, drawn in enumerate(context.result):
        field = f"params.context.result.{index}"
        x, y = _percent(drawn, "x", field) * width / 100, _percent(drawn, "y", field) * height / 100
        if drawn.type.startswith("rectangle"):
            wide = _percent(drawn, "width", field) * width / 100
            high = _percent(drawn, "height", field) * height / 100
            box = (x, y, x + max(wide, 1), y + max(high, 1))
        else:
            points.append((x, y))
            signs.append(1 if drawn.is_positive else 0)
    return PromptSpec(box=box, points=points, labels=signs)


def _percent(drawn: Drawn, side: str, field: str) -> float:
    if not drawn.type.startswith(("keypoint", "rectangle")):
        raise InvalidRequest(
            f'a smart tool drew {drawn.type!r}; give smart="true" to KeyPointLabels or '
            "RectangleLabels",
            field=f"{field}.type",
        )
    value = drawn.value.get(side)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InvalidRequest(
            f"{side} is {value!r}; a smart tool gives percent of the picture, 0 to 100",
            field=f"{field}.value.{side}",
        )
    return float(value)


def _label(context: Context) -> str | None:
    """The label that the person chose."""
    chosen = context.result[0].value.get(context.result[0].type)
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        return chosen[0]
    return None


def _brush(made: Segmented, label: str | None, control: Control, to_name: str) -> dict[str, Any]:
    found = made.masks[0]
    size = (made.height, made.width)
    return {
        **common_fields(size, control.name, to_name),
        "id": uuid.uuid4().hex[:10],
        "type": "brushlabels",
        "score": min(max(found.predicted_iou, 0.0), 1.0),  # a segmenter may go beyond
        "value": {
            "format": "rle",
            "rle": pack_brush(placed_mask(found.mask), size),
            "brushlabels": [label] if label in control.labels else [],
        },
    }
