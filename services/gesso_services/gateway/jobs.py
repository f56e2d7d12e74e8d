"""``/v1/jobs``: submit (idempotent), look, list, follow, withdraw. States are those of the bus."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response
from gesso_contracts import (
    AnnotateCars,
    AnnotateText,
    AnswerTurn,
    DrawSigns,
    GenerateImage,
    ImagePart,
    JobState,
    JobStatus,
    VaryImage,
    VideoPart,
    limits,
)
from gesso_contracts.base import JobId, Message
from gesso_contracts.conversations import Part
from gesso_core.errors import GessoError

from gesso_services.gateway import annotation_door, annotation_drawn, results, streams
from gesso_services.gateway.admission import Door
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models, check_size
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.job_kinds import AnyJob
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.schemas import JobPage
from gesso_services.gateway.uploads import INLINE_BYTES_PER_JOB, Intake
from gesso_services.runtime.job_events import follow
from gesso_services.runtime.job_list import list_jobs

PATH = "/v1/jobs"
router = APIRouter(prefix=PATH, tags=["jobs"])


def _known(description: str) -> dict[str, Any]:
    return {"model": JobState, "description": description}


@router.put(
    "/{job_id}",
    status_code=202,
    responses=documented(
        400, 401, 404, 409, 413, 422, 429, 500, 503, ok=_known("The job was there already.")
    ),
)
async def submit_job(
    *,
    job_id: JobId,
    body: Annotated[AnyJob, Body()],
    response: Response,
    _: Caller,
    fabric: Here,
    models: Models,
    door: Door,
) -> JobState:
    """Put a job in the queue. The same id with the same request is the same job; 202 means that it
    is durable, 200 that it was there already.
    """
    wanted = body.request
    served = await models.find(body.kind, wanted.model)
    if isinstance(wanted, GenerateImage):
        check_size(served.entry, wanted.width, wanted.height)
    if isinstance(wanted, DrawSigns):
        await annotation_drawn.find_generator(models, wanted.generator, "request.generator")
    async with door.admitted(served.service):
        message = await _looked_at(wanted, Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB))
    state, new = await fabric.jobs.submit(served.service, body.kind, message, job_id=job_id)
    response.status_code = 202 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job_id}"
    return state


@router.get("", responses=documented(401, 422, 429, 500, 503))
async def list_of_jobs(
    _: Caller,
    fabric: Here,
    status: JobStatus | None = None,
    limit: Annotated[int, Query(ge=1, le=limits.MAX_LIST)] = 20,
    cursor: Annotated[
        str | None, Query(pattern=r"^[0-9]{1,18}$", description="`next_cursor` of the last page")
    ] = None,
) -> JobPage:
    """Jobs, last changed first."""
    page = await list_jobs(fabric.jobs, status=status, limit=limit, cursor=cursor)
    return JobPage(data=page.jobs, next_cursor=page.cursor)


@router.get("/{job_id}", responses=documented(401, 404, 422, 429, 500, 503))
async def get_job(job_id: JobId, _: Caller, fabric: Here) -> JobState:
    """What is known about a job."""
    return await fabric.jobs.get(job_id)


@router.delete(
    "/{job_id}",
    status_code=202,
    responses=documented(401, 404, 409, 422, 429, 500, 503, ok=_known("The job is cancelled.")),
)
async def cancel_job(job_id: JobId, response: Response, _: Caller, fabric: Here) -> JobState:
    """Withdraw a job. 200: it will never run, or has stopped; 202: it stops at its next step."""
    state = await fabric.jobs.cancel(job_id)
    if state.status in ("succeeded", "failed"):
        raise EdgeError(
            409, "finished", f"job {job_id!r} has {state.status} already; there is nothing to stop"
        )
    response.status_code = 200 if state.status == "cancelled" else 202
    return state


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses=documented(401, 404, 422, 429, 500, 503, ok={"content": streams.DOCUMENTED}),
)
async def follow_job(job_id: JobId, _: Caller, fabric: Here) -> streams.EventStream:
    """Server-sent events `state`, `progress`, `preview` and `text`: the state now, then what
    happens, until the job is final. Their data are the events of the bus.
    """
    await fabric.jobs.get(job_id)
    return streams.EventStream(_events(fabric, job_id))


@router.get(
    "/{job_id}/result",
    response_class=Response,
    responses=documented(401, 404, 409, 422, 429, 500, 503, 507, ok={"content": results.ANYTHING}),
)
async def get_result(job_id: JobId, _: Caller, fabric: Here) -> Response:
    """What the job made: a picture, a video, or an answer or labels as JSON."""
    return await results.anything(fabric, job_id)


async def _looked_at(wanted: Message, intake: Intake) -> Message:
    """The message with its pictures and videos checked, and the large ones laid down as blobs."""
    if isinstance(wanted, AnnotateText | AnnotateCars):
        return await annotation_door.looked_at(wanted, intake, "request")
    if isinstance(wanted, VaryImage):
        return wanted.model_copy(
            update={"image": await intake.again(wanted.image, "request.image")}
        )
    if isinstance(wanted, AnswerTurn):
        turns = [
            turn.model_copy(
                update={
                    "parts": [
                        await _part(part, f"request.turns.{i}.parts.{j}", intake)
                        for j, part in enumerate(turn.parts)
                    ]
                }
            )
            for i, turn in enumerate(wanted.turns)
        ]
        return wanted.model_copy(update={"turns": turns})
    return wanted


async def _part(part: Part, field: str, intake: Intake) -> Part:
    if isinstance(part, ImagePart):
        image = await intake.again(part.image, f"{field}.image")
        return part.model_copy(update={"image": image})
    if isinstance(part, VideoPart):
        video = await intake.again(part.video, f"{field}.video", video=True)
        return part.model_copy(update={"video": video})
    return part


async def _events(fabric: Fabric, job_id: str) -> AsyncGenerator[bytes, None]:
    try:
        async with follow(fabric.jobs, job_id) as events:
            beats = streams.with_heartbeats(events, fabric.settings.heartbeat_s)
            async with aclosing(beats):
                async for event in beats:
                    yield (
                        streams.HEARTBEAT
                        if event is None
                        else streams.event(event.event, event.model_dump_json())
                    )
    except GessoError as error:
        yield streams.failure(error)
