"""``/v1/annotations``: clicks to masks at once; words and cars to labels, by durable jobs.

A picture comes in the request and from nowhere else: no URL is ever fetched.
"""

import asyncio
import re
import time
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from gesso_contracts import (
    AnnotateCars,
    AnnotateText,
    CarLabels,
    CarsAnnotated,
    JobState,
    Segmented,
    SegmentPrompts,
    SignsDrawn,
    TextAnnotated,
    TextLabels,
    limits,
)
from gesso_contracts.base import JobId, Message
from gesso_contracts.blobs import BlobRef
from gesso_core.errors import NotFound

from gesso_services.gateway import annotation_door as at_door
from gesso_services.gateway import annotation_results, exports, orders, results
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.annotation_schemas import (
    CarsAnnotation,
    CarsForm,
    SegmentAnswer,
    SegmentForm,
    TextAnnotation,
    TextForm,
)
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.orders import IdempotencyKey, Order
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.uploads import INLINE_BYTES_PER_CALL, INLINE_BYTES_PER_JOB, Intake
from gesso_services.runtime import rpc

PATH: Final = "/v1/annotations"
TEXT: Final = "annotate-text"
CARS: Final = "annotate-cars"
GLB: Final = "model/gltf-binary"
PARTS: Final = (*results.PICTURE_TYPES, GLB, results.OPAQUE)
Part = Literal["overlay", "birds-eye", "meshes", "occupancy"]
MULTIPART: Final = "multipart/form-data"
router = APIRouter(tags=["annotations"])
M = TypeVar("M", bound=Message)

STARTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"model": JobState, "description": "With `wait` false: the job is durable."}
}
REFUSALS: Final = (400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507)


@router.post(
    f"{PATH}/segment",
    responses=documented(400, 401, 404, 413, 422, 429, 500, 503, 507),
    dependencies=[Depends(open_place)],
)
async def segment(
    _: Caller,
    body: Annotated[SegmentForm, Form(media_type=MULTIPART)],
    fabric: Here,
    models: Models,
) -> SegmentAnswer:
    """Cut out what boxes and clicks point at, one mask per prompt, as COCO's compressed run
    lengths. The picture is remembered, so the next click on it is fast.
    """
    served = await models.find("segment", body.model)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_CALL)
    data = await body.image.read()
    at_door.check_prompts(body.prompts, await intake.measure(data, "image"), "prompts")
    question = SegmentPrompts(
        model=served.name,
        image=await intake.pack_picture(data, "image"),
        prompts=body.prompts,
        multimask=body.multimask,
    )
    made = await rpc.call(
        fabric.bus,
        served.service,
        "segment",
        question,
        Segmented,
        timeout=fabric.settings.deadline_s,
    )
    return SegmentAnswer(created=int(time.time()), model=served.name, **made.model_dump())


@router.post(
    f"{PATH}/text",
    response_model=TextAnnotation,
    responses=documented(*REFUSALS) | STARTED,
    dependencies=[Depends(open_place)],
)
async def annotate_text(
    *,
    body: Annotated[TextForm, Form(media_type=MULTIPART)],
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Masks for every character of the words, with the reason where a person should look. Without
    `words` a reader finds and reads them.
    """
    served = await models.find(TEXT, body.model)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB)
    async with door.admitted(served.service):
        data = await body.image.read()
        at_door.check_words(body.words, await intake.measure(data, "image"), "words")
        message = AnnotateText(
            model=served.name,
            image=await intake.pack_picture(data, "image"),
            name=file_name(body.image),
            words=body.words,
            refine=body.refine,
            min_score=body.min_score,
        )
    order = _order(served.service, TEXT, message, caller, idempotency_key)
    return await deliver(request, fabric, order, wait=body.wait)


@router.post(
    f"{PATH}/cars",
    response_model=CarsAnnotation,
    responses=documented(*REFUSALS) | STARTED,
    dependencies=[Depends(open_place)],
)
async def annotate_cars(
    *,
    body: Annotated[CarsForm, Form(media_type=MULTIPART)],
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """A box in space and a shape for the car of every prompt. Without `points` from the picture
    alone, which is flagged.
    """
    served = await models.find(CARS, body.model)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB)
    async with door.admitted(served.service):
        data = await body.image.read()
        size = await intake.measure(data, "image")
        at_door.check_car_prompts(body.prompts, size, "prompts")
        calibration = at_door.read_calibration(await body.calibration.read())
        scan = None if body.points is None else await body.points.read()
        message = AnnotateCars(
            model=served.name,
            calibration=calibration,
            points=None if scan is None else await at_door.take_points(scan, intake),
            image=await intake.pack_picture(data, "image"),
            name=file_name(body.image),
            prompts=body.prompts,
            driving_side=body.driving_side,
            meshes=body.meshes,
            occupancy=body.occupancy,
        )
    order = _order(served.service, CARS, message, caller, idempotency_key)
    return await deliver(request, fabric, order, wait=body.wait)


@router.get(
    f"{PATH}/{{job_id}}/{{part}}",
    response_class=Response,
    responses=documented(401, 404, 409, 422, 429, 500, 503, ok={"content": results.binary(*PARTS)}),
)
async def get_part(job_id: JobId, part: Part, _: Caller, fabric: Here) -> Response:
    """A picture of a finished annotation, or the surfaces of its cars as GLB, or the voxels that
    they fill as PLY.
    """
    made = _made(await results.finished(fabric, job_id))
    ref: BlobRef | None = getattr(made, part.replace("-", "_"), None)
    if ref is None:
        raise NotFound(f"the annotation {job_id!r} has no {part}")
    return await results.file(fabric, ref, PARTS)


@router.get(
    "/v1/jobs/{job_id}/export",
    response_class=Response,
    responses=documented(
        401,
        404,
        409,
        422,
        429,
        500,
        503,
        ok={"content": results.binary(exports.JSON, exports.ZIP, exports.PLAIN)},
    ),
    dependencies=[Depends(open_place)],
)
async def export(
    job_id: JobId,
    wanted: Annotated[
        exports.ExportFormat,
        Query(
            alias="format",
            description=f"text and drawn signs: {', '.join(exports.TEXT_FORMATS)}; "
            f"cars: {', '.join(exports.CAR_FORMATS)}",
        ),
    ],
    _: Caller,
    fabric: Here,
) -> Response:
    """A finished annotation as a file that other tools read."""
    state = await results.finished(fabric, job_id)
    made = _made(state)
    known = exports.CAR_FORMATS if isinstance(made, CarsAnnotated) else exports.TEXT_FORMATS
    if wanted not in known:
        raise EdgeError(
            422,
            "invalid_request",
            f"format {wanted!r} cannot hold what a job of the kind {state.kind!r} makes; "
            f"use {' or '.join(known)}",
            field="format",
        )
    file = await _file(fabric, made, job_id, wanted)
    return Response(
        file.data,
        media_type=file.media_type,
        headers={"Content-Disposition": _to_keep(file.name)},
    )


async def _file(
    fabric: Fabric,
    made: TextAnnotated | CarsAnnotated | SignsDrawn,
    job_id: str,
    wanted: exports.ExportFormat,
) -> exports.File:
    if isinstance(made, SignsDrawn):
        signs = await annotation_results.labelled_signs(fabric, made)
        return await asyncio.to_thread(exports.signs_file, signs, made, job_id, wanted)
    data = await fabric.blobs.get(made.image)
    picture = exports.Picture.named(made.name, job_id, data, made.image.media_type)
    if isinstance(made, CarsAnnotated):
        cars = await annotation_results.labels_of(fabric, made.labels, CarLabels)
        return await asyncio.to_thread(exports.cars_file, cars, made.kitti, picture, wanted)
    words = await annotation_results.labels_of(fabric, made.labels, TextLabels)
    return await asyncio.to_thread(exports.text_file, words, picture, wanted)


def file_name(upload: UploadFile) -> str | None:
    """The name of an uploaded file without its folders; None where nothing is left of it."""
    name = PureWindowsPath(PurePosixPath(upload.filename or "").name).name
    name = re.sub(r"[\x00-\x1f\x7f]", "", name)[-limits.FILE_NAME_CHARS :]
    return name if name.strip(". ") else None


def _to_keep(name: str) -> str:
    """The header that says under which name to keep a file, for old clients in ASCII, too."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name)}"


def _made(state: JobState) -> TextAnnotated | CarsAnnotated | SignsDrawn:
    if state.kind == CARS:
        return orders.result_of(state, CarsAnnotated)
    if state.result_schema == SignsDrawn.schema_name():
        return orders.result_of(state, SignsDrawn)
    return orders.result_of(state, TextAnnotated)


def _order(service: str, kind: str, message: M, caller: str, key: str | None) -> Order[M]:
    name, _ = orders.name_and_seed(caller, key, kind.removeprefix("annotate-"))
    return Order(service=service, kind=kind, jobs=((name, message),), lasting=key is not None)


async def deliver(request: Request, fabric: Fabric, order: Order[Message], *, wait: bool) -> Any:
    """The labels, or the job that makes them."""
    if wait:
        done = await orders.while_connected(request, orders.fulfil(fabric, order))
        if done is None:
            return Response(status_code=499)
        return await annotation_results.answer(fabric, done[0])
    ((job_id, message),) = order.jobs
    state, _ = await fabric.jobs.submit(order.service, order.kind, message, job_id=job_id)
    headers = {"Location": f"/v1/jobs/{job_id}"}
    body = state.model_dump_json()
    return Response(body, status_code=202, headers=headers, media_type="application/json")
