"""``/v1/jobs``: submit (idempotent), look, list, follow, withdraw. States are those of the bus."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from gesso_contracts import JobState, JobStatus, limits
from gesso_contracts.base import JobId
from gesso_core.errors import GessoError

from gesso_services.gateway import painting, streams
from gesso_services.gateway.admission import Door
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models, check_size
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.images import PICTURE, picture_response
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.schemas import GenerateImageJob, JobPage
from gesso_services.runtime.job_events import follow
from gesso_services.runtime.job_list import list_jobs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


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
    body: GenerateImageJob,
    response: Response,
    _: Caller,
    fabric: Here,
    models: Models,
    door: Door,
) -> JobState:
    """Put a job in the queue. The same id with the same request is the same job; 202 means that it
    is durable, 200 that it was there already.
    """
    entry = await models.find("text-to-image", body.request.model)
    check_size(entry, body.request.width, body.request.height)
    await door.admit(painting.SERVICE)
    state, new = await fabric.jobs.submit(painting.SERVICE, body.kind, body.request, job_id=job_id)
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
    """Server-sent events `state`, `progress` and `preview`: the state now, then what happens, until
    the job is final. Their data are the events of the bus.
    """
    await fabric.jobs.get(job_id)
    return streams.EventStream(_events(fabric, job_id))


@router.get(
    "/{job_id}/result",
    response_class=Response,
    responses=documented(401, 404, 409, 422, 429, 500, 503, 507, ok={"content": PICTURE}),
)
async def get_result(job_id: JobId, _: Caller, fabric: Here) -> Response:
    """The picture that the job made."""
    return await picture_response(fabric, job_id)


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
