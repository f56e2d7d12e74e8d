"""Bodies of ``/v1/videos``; the request is JSON, or the form that OpenAI's client sends."""

import json
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from gesso_contracts import VideoFormat, limits
from gesso_contracts.base import ModelName, Prompt
from gesso_contracts.messages import TopK, TopP
from pydantic import BaseModel, Field, ValidationError

from gesso_services.gateway.schemas import Body, Guidance, Seed

FORM = "multipart/form-data"


class VideoRequest(Body):
    """``POST /v1/videos``; what is left out takes the model's own default."""

    model: ModelName | None = Field(None, description="default: the first that can")
    prompt: Prompt
    seed: Seed | None = Field(None, description="drawn by the gateway when left out")
    fps: int = Field(8, ge=1, le=limits.MAX_FRAMES_PER_S, description="frames per second")
    output_format: VideoFormat = "mp4"
    guidance_scale: Guidance | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None


VideoStatus = Literal["queued", "in_progress", "completed", "failed"]


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Video(BaseModel):
    """OpenAI's video object; ``id`` is the id of the job that makes it."""

    id: str
    object: Literal["video"] = "video"
    status: VideoStatus
    progress: int = Field(ge=0, le=100, description="percent")
    created_at: int = Field(description="Unix seconds")
    completed_at: int | None = None
    model: str | None = None
    prompt: str | None = Field(default=None, description="told when the video begins")
    seconds: str | None = None
    size: str | None = None
    seed: int | None = None
    fps: int | None = None
    error: VideoError | None = None


class VideoDeleted(BaseModel):
    """The video will not be made."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


async def _read(request: Request) -> VideoRequest:
    is_form = request.headers.get("content-type", "").startswith(FORM)
    values = await (_form(request) if is_form else _json(request))
    try:
        return VideoRequest.model_validate(values, strict=not is_form)
    except ValidationError as error:
        found = error.errors(include_url=False)
        wrong = [{**one, "loc": ("body", *one["loc"])} for one in found]
        raise RequestValidationError(wrong) from error


async def _form(request: Request) -> dict[str, Any]:
    async with request.form() as form:  # closes files that came along
        return dict(form)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        # Beside what is no JSON also what is no UTF-8, too deep, or a number of 5000 digits.
        place, reason = 0, str(error).partition(";")[0]
        if isinstance(error, json.JSONDecodeError):
            place, reason = error.pos, error.msg
        wrong = {"type": "json_invalid", "loc": ("body", place), "msg": "", "input": {}}
        raise RequestValidationError([{**wrong, "ctx": {"error": reason}}]) from error


VideoBody = Annotated[VideoRequest, Depends(_read)]
DOCUMENTED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoRequest.model_json_schema()}
            for kind in ("application/json", FORM)
        },
    }
}
