"""``/v1/videos``: short videos as OpenAI has them: begun here, looked at later, fetched when done.

A video is a job of the kind ``generate-video`` and has its id, so ``/v1/jobs/{id}/events`` tells
its progress as well.
"""

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Depends, Response
from gesso_contracts import GenerateVideo, JobState, JobStatus, VideoReady
from gesso_contracts.base import JobId
from gesso_core.errors import NotFound

from gesso_services.gateway import orders, results
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.orders import IdempotencyKey
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.video_schemas import (
    DOCUMENTED,
    Video,
    VideoBody,
    VideoDeleted,
    VideoError,
    VideoStatus,
)

PATH: Final = "/v1/videos"
KIND: Final = "generate-video"
PREVIEWS: Final = 8
STATUS: Final[Mapping[JobStatus, VideoStatus]] = {
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
router = APIRouter(prefix=PATH, tags=["videos"])


@router.post(
    "",
    status_code=202,
    response_model_exclude_none=True,
    responses=documented(400, 401, 404, 409, 413, 422, 429, 500, 503),
    dependencies=[Depends(open_place)],
    openapi_extra=DOCUMENTED,
)
async def begin(
    *,
    body: VideoBody,
    response: Response,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Video:
    """Begin a video. 202 means that it is durable: look at `/v1/videos/{id}` until it is completed,
    or follow `/v1/jobs/{id}/events`, and fetch it at `/v1/videos/{id}/content`.
    """
    served = await models.find(KIND, body.model)
    video_id, drawn = orders.name_and_seed(caller, idempotency_key, "video")
    message = GenerateVideo(
        model=served.name,
        prompt=body.prompt,
        seed=drawn if body.seed is None else body.seed,
        guidance_scale=body.guidance_scale,
        top_k=body.top_k,
        top_p=body.top_p,
        frames_per_s=body.fps,
        output_format=body.output_format,
        preview_every=max(1, served.entry.steps // PREVIEWS),
    )
    await door.admit(served.service)
    state, _ = await fabric.jobs.submit(served.service, KIND, message, job_id=video_id)
    response.headers["Location"] = f"{PATH}/{video_id}"
    about = {"model": served.name, "prompt": body.prompt, "seed": message.seed, "fps": body.fps}
    return _video(state).model_copy(update=about)


@router.get(
    "/{video_id}",
    response_model_exclude_none=True,
    responses=documented(401, 404, 422, 429, 500, 503),
)
async def get_video(video_id: JobId, _: Caller, fabric: Here) -> Video:
    """How far it is; what made it is told once it is completed."""
    return _video(await _state(fabric, video_id))


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses=documented(401, 404, 409, 422, 429, 500, 503, 507, ok={"content": results.VIDEO}),
)
async def get_video_content(video_id: JobId, _: Caller, fabric: Here) -> Response:
    """The file of a video that is completed."""
    await _state(fabric, video_id)
    return await results.video(fabric, video_id)


@router.delete("/{video_id}", responses=documented(401, 404, 409, 422, 429, 500, 503))
async def delete_video(video_id: JobId, _: Caller, fabric: Here) -> VideoDeleted:
    """Withdraw a video that is not completed; one that runs stops at its next step."""
    await _state(fabric, video_id)
    state = await fabric.jobs.cancel(video_id)
    if state.status in ("succeeded", "failed"):
        raise EdgeError(
            409,
            "finished",
            f"video {video_id!r} is {STATUS[state.status]} already; there is nothing to stop, and "
            "its file goes away by itself",
        )
    return VideoDeleted(id=video_id)


async def _state(fabric: Fabric, video_id: str) -> JobState:
    state = await fabric.jobs.get(video_id)
    if state.kind != KIND:
        raise NotFound(f"job {video_id!r} makes no video; look at /v1/jobs/{video_id}")
    return state


def _video(state: JobState) -> Video:
    video = Video(
        id=state.id,
        status=STATUS[state.status],
        progress=100 if state.status == "succeeded" else int(100 * state.progress),
        created_at=int(state.created_at.timestamp()),
    )
    if state.status == "succeeded":
        return video.model_copy(update=_made(state))
    if state.problem is not None:
        error = VideoError(code=state.problem.code, message=state.problem.detail)
        return video.model_copy(update={"error": error})
    if state.status == "cancelled":
        error = VideoError(code="cancelled", message="the video was withdrawn")
        return video.model_copy(update={"error": error})
    return video


def _made(state: JobState) -> dict[str, object]:
    ready = orders.result_of(state, VideoReady)
    return {
        "completed_at": int(state.updated_at.timestamp()),
        "model": ready.provenance.model,
        "seconds": f"{ready.frames / ready.frames_per_s:g}",
        "size": f"{ready.width}x{ready.height}",
        "seed": ready.seed,
        "fps": ready.frames_per_s,
    }
