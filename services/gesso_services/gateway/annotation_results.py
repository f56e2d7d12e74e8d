"""Finished annotations as answers: what the job's state tells, and the labels out of their blob."""

from typing import Final, TypeVar

from gesso_contracts import CarLabels, CarsAnnotated, JobState, TextAnnotated, TextLabels, parse
from gesso_contracts.base import Message
from gesso_contracts.blobs import BlobRef

from gesso_services.gateway import orders
from gesso_services.gateway.annotation_schemas import CarsAnnotation, TextAnnotation
from gesso_services.gateway.exports import CAR_FORMATS, TEXT_FORMATS
from gesso_services.gateway.fabric import Fabric

SCHEMAS: Final = (TextAnnotated.schema_name(), CarsAnnotated.schema_name())
R = TypeVar("R", bound=Message)


async def answer(fabric: Fabric, state: JobState) -> TextAnnotation | CarsAnnotation:
    """All that a finished annotation made; 409 for a job that made something else."""
    if state.result_schema == CarsAnnotated.schema_name():
        return await cars(fabric, state)
    return await text(fabric, state)


async def text(fabric: Fabric, state: JobState) -> TextAnnotation:
    """Words with the masks of their characters."""
    made = orders.result_of(state, TextAnnotated)
    labels = await labels_of(fabric, made.labels, TextLabels)
    return TextAnnotation(
        id=state.id,
        created=int(state.updated_at.timestamp()),
        name=made.name,
        width=made.width,
        height=made.height,
        flagged=made.summary.flagged,
        refused=made.summary.refused,
        overlay=_path(state, "overlay"),
        exports=_exports(state, TEXT_FORMATS),
        provenance=made.provenance,
        transcription=made.transcription,
        summary=made.summary,
        words=labels.words,
    )


async def cars(fabric: Fabric, state: JobState) -> CarsAnnotation:
    """Cars with their boxes in space."""
    made = orders.result_of(state, CarsAnnotated)
    labels = await labels_of(fabric, made.labels, CarLabels)
    return CarsAnnotation(
        id=state.id,
        created=int(state.updated_at.timestamp()),
        name=made.name,
        width=made.width,
        height=made.height,
        flagged=made.flagged,
        refused=made.refused,
        overlay=_path(state, "overlay"),
        exports=_exports(state, CAR_FORMATS),
        provenance=made.provenance,
        cars=made.cars,
        birds_eye=_path(state, "birds-eye"),
        meshes=_path(state, "meshes") if made.meshes else None,
        objects=labels.objects,
    )


async def labels_of(fabric: Fabric, ref: BlobRef, labels: type[R]) -> R:
    """The labels in a blob, which is JSON."""
    return parse(await fabric.blobs.get(ref), labels)


def _path(state: JobState, part: str) -> str:
    return f"/v1/annotations/{state.id}/{part}"


def _exports(state: JobState, formats: tuple[str, ...]) -> dict[str, str]:
    return {name: f"/v1/jobs/{state.id}/export?format={name}" for name in formats}
