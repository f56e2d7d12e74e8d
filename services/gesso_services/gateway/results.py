"""What a finished job made, as the body of an answer: a picture, a video, or words or labels as
JSON.
"""

from typing import Any, Final

from fastapi import Response
from gesso_contracts import ImageReady, JobState, TurnAnswered, VideoReady
from gesso_contracts.blobs import BlobRef

from gesso_services.gateway import annotation_results, orders
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.problems import EdgeError

OPAQUE: Final = "application/octet-stream"
PICTURE_TYPES: Final = ("image/png", "image/jpeg", "image/webp")
VIDEO_TYPES: Final = ("video/mp4", "image/webp", "image/gif")


def binary(*media_types: str) -> dict[str, Any]:
    """Files of these kinds, for the documents."""
    return {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}


PICTURE: Final = binary(*PICTURE_TYPES)
VIDEO: Final = binary(*VIDEO_TYPES)
ANYTHING: Final = PICTURE | VIDEO | {"application/json": {"schema": {"type": "object"}}}


async def picture(fabric: Fabric, job_id: str) -> Response:
    """The picture that a job made; 409 while it is not finished, or when it made something else."""
    state = await finished(fabric, job_id)
    return await file(fabric, orders.result_of(state, ImageReady).image, PICTURE_TYPES)


async def video(fabric: Fabric, job_id: str) -> Response:
    """The video that a job made; 409 like :func:`picture`."""
    state = await finished(fabric, job_id)
    return await file(fabric, orders.result_of(state, VideoReady).video, VIDEO_TYPES)


async def anything(fabric: Fabric, job_id: str) -> Response:
    """Whatever a job made; 409 while it is not finished."""
    state = await finished(fabric, job_id)
    orders.raise_unless_succeeded(state)
    if state.result_schema == TurnAnswered.schema_name():
        answer = orders.result_of(state, TurnAnswered)
        return Response(answer.model_dump_json(), media_type="application/json")
    if state.result_schema in annotation_results.SCHEMAS:
        labels = await annotation_results.answer(fabric, state)
        return Response(labels.model_dump_json(), media_type="application/json")
    made = video if state.result_schema == VideoReady.schema_name() else picture
    return await made(fabric, job_id)


async def finished(fabric: Fabric, job_id: str) -> JobState:
    """The last state of a job; 409 while there is none."""
    state = await fabric.jobs.get(job_id)
    if not state.is_final:
        raise EdgeError(
            409,
            "not_finished",
            f"job {job_id!r} is {state.status}; follow it at /v1/jobs/{job_id}/events and ask "
            "again when it has succeeded",
        )
    return state


async def file(fabric: Fabric, ref: BlobRef, known: tuple[str, ...]) -> Response:
    """The bytes of a blob, as the kind that they claim where it is one of ``known``."""
    return Response(
        await fabric.blobs.get(ref),
        media_type=ref.media_type if ref.media_type in known else OPAQUE,
        headers={"Cache-Control": "private, max-age=3600", "ETag": f'"{ref.key}"'},
    )
