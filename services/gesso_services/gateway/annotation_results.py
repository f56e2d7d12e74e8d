"""Finished annotations as answers: what the job's state tells, and the labels out of their blob."""

import asyncio
from typing import Any, Final, TypeVar

from gesso_contracts import (
    CarLabels,
    CarsAnnotated,
    DrawnSign,
    JobState,
    SignsDrawn,
    TextAnnotated,
    TextLabels,
    parse,
)
from gesso_contracts.base import Message
from gesso_contracts.blobs import BlobRef

from gesso_services.gateway import orders
from gesso_services.gateway.annotation_schemas import (
    CarsAnnotation,
    SignAnnotation,
    SignsAnnotation,
    TextAnnotation,
)
from gesso_services.gateway.exports import CAR_FORMATS, TEXT_FORMATS, Picture
from gesso_services.gateway.fabric import Fabric

SCHEMAS: Final = (
    TextAnnotated.schema_name(),
    CarsAnnotated.schema_name(),
    SignsDrawn.schema_name(),
)
R = TypeVar("R", bound=Message)


async def answer(
    fabric: Fabric, state: JobState
) -> TextAnnotation | CarsAnnotation | SignsAnnotation:
    """All that a finished annotation made; 409 for a job that made something else."""
    if state.result_schema == CarsAnnotated.schema_name():
        return await cars(fabric, state)
    if state.result_schema == SignsDrawn.schema_name():
        return await signs(fabric, state)
    return await text(fabric, state)


async def text(fabric: Fabric, state: JobState) -> TextAnnotation:
    """Words with the masks of their characters."""
    made = orders.result_of(state, TextAnnotated)
    labels = await labels_of(fabric, made.labels, TextLabels)
    return TextAnnotation(
        **_about(state, made, TEXT_FORMATS),
        flagged=made.summary.flagged,
        refused=made.summary.refused,
        transcription=made.transcription,
        summary=made.summary,
        words=labels.words,
    )


async def cars(fabric: Fabric, state: JobState) -> CarsAnnotation:
    """Cars with their boxes in space."""
    made = orders.result_of(state, CarsAnnotated)
    labels = await labels_of(fabric, made.labels, CarLabels)
    return CarsAnnotation(
        **_about(state, made, CAR_FORMATS),
        flagged=made.flagged,
        refused=made.refused,
        cars=made.cars,
        birds_eye=_path(state, "birds-eye"),
        meshes=_path(state, "meshes") if made.meshes else None,
        occupancy=_path(state, "occupancy") if made.occupancy else None,
        objects=labels.objects,
    )


async def signs(fabric: Fabric, state: JobState) -> SignsAnnotation:
    """Pictures that were drawn, with the labels of their words."""
    made = orders.result_of(state, SignsDrawn)
    labels = await asyncio.gather(
        *(labels_of(fabric, sign.labels, TextLabels) for sign in made.pictures)
    )
    return SignsAnnotation(
        id=state.id,
        created=int(state.updated_at.timestamp()),
        width=made.width,
        height=made.height,
        words=made.words,
        text=made.text,
        agreement=made.agreement,
        exports=_exports(state, TEXT_FORMATS),
        generator=made.generator,
        provenance=made.provenance,
        pictures=[
            _sign(state, index, sign, found)
            for index, (sign, found) in enumerate(zip(made.pictures, labels, strict=True))
        ],
    )


async def labelled_signs(fabric: Fabric, made: SignsDrawn) -> list[tuple[Picture, TextLabels]]:
    """Every picture of a job with its labels, for the files of other tools."""
    found = []
    for sign in made.pictures:
        data = await fabric.blobs.get(sign.image)
        picture = Picture(sign.name, data, sign.image.media_type)
        found.append((picture, await labels_of(fabric, sign.labels, TextLabels)))
    return found


async def labels_of(fabric: Fabric, ref: BlobRef, labels: type[R]) -> R:
    """The labels in a blob, which is JSON."""
    return parse(await fabric.blobs.get(ref), labels)


def _about(
    state: JobState, made: TextAnnotated | CarsAnnotated, formats: tuple[str, ...]
) -> dict[str, Any]:
    """What is told of every annotation of a picture that came in."""
    return {
        "id": state.id,
        "created": int(state.updated_at.timestamp()),
        "name": made.name,
        "width": made.width,
        "height": made.height,
        "overlay": _path(state, "overlay"),
        "exports": _exports(state, formats),
        "provenance": made.provenance,
    }


def _sign(state: JobState, index: int, sign: DrawnSign, labels: TextLabels) -> SignAnnotation:
    return SignAnnotation(
        index=index,
        name=sign.name,
        seed=sign.seed,
        job=sign.drawn_by,
        image=_path(state, f"pictures/{index}/image"),
        overlay=_path(state, f"pictures/{index}/overlay"),
        truth=_path(state, f"pictures/{index}/truth"),
        agreement=sign.agreement,
        summary=sign.summary,
        words=labels.words,
    )


def _path(state: JobState, part: str) -> str:
    return f"/v1/annotations/{state.id}/{part}"


def _exports(state: JobState, formats: tuple[str, ...]) -> dict[str, str]:
    return {name: f"/v1/jobs/{state.id}/export?format={name}" for name in formats}
