"""``/v1/images``: text to pictures in OpenAI's vocabulary, and the picture behind a job's URL."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from gesso_contracts import ImageReady, JobPreview, JobProgress, JobStateChanged, JobText
from gesso_contracts.base import JobId
from gesso_core.errors import GessoError

from gesso_services.gateway import painting, streams
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.schemas import ImageData, ImageRequest, ImagesResponse, Metadata
from gesso_services.runtime.job_events import Event

router = APIRouter(prefix="/v1/images", tags=["images"])

IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
PICTURE: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES
}
IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=200,
        description="The same key again joins the same jobs instead of starting new ones.",
    ),
]


@router.post(
    "/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=documented(
        400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507, ok={"content": streams.DOCUMENTED}
    ),
    dependencies=[Depends(open_place)],
)
async def generate(
    *,
    body: ImageRequest,
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Paint `n` pictures. With `stream` the answer is a stream of server-sent events:
    `image_generation.progress`, `.partial_image` and `.completed`, or one `error`.
    """
    entry = await models.find("text-to-image", body.model)
    order = painting.plan(body, entry, caller=caller, idempotency_key=idempotency_key)
    await door.admit(painting.SERVICE, len(order.jobs))
    if body.stream:
        scribe = _Scribe(request, fabric, order, body)
        return streams.EventStream(_stream(fabric, order, scribe))
    made = await _while_connected(request, fabric, order)
    if made is None:
        return Response(status_code=499)  # nobody is there to read it
    return await _answer(request, fabric, order, body, made)


@router.get(
    "/{job_id}/content",
    responses=documented(401, 404, 409, 422, 429, 500, 503, 507, ok={"content": PICTURE}),
    response_class=Response,
    name="get_image",
)
async def get_image(job_id: JobId, _: Caller, fabric: Here) -> Response:
    """The picture of a job that succeeded."""
    return await picture_response(fabric, job_id)


async def picture_response(fabric: Fabric, job_id: str) -> Response:
    """The bytes that a job made; 409 while it is not finished."""
    state = await fabric.jobs.get(job_id)
    if not state.is_final:
        raise EdgeError(
            409,
            "not_finished",
            f"job {job_id!r} is {state.status}; follow it at /v1/jobs/{job_id}/events and ask "
            "again when it has succeeded",
        )
    ready = painting.result_of(state)
    data = await fabric.blobs.get(ready.image)
    known = ready.image.media_type in IMAGE_TYPES
    return Response(
        data,
        media_type=ready.image.media_type if known else "application/octet-stream",
        headers={"Cache-Control": "private, max-age=3600", "ETag": f'"{ready.image.key}"'},
    )


async def _while_connected(
    request: Request, fabric: Fabric, order: painting.Order
) -> list[ImageReady] | None:
    """The pictures, or None when the client leaves first."""
    work = asyncio.ensure_future(painting.paint(fabric, order))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(
    request: Request,
    fabric: Fabric,
    order: painting.Order,
    body: ImageRequest,
    made: list[ImageReady],
) -> ImagesResponse:
    data = [
        ImageData(
            seed=ready.seed,
            job_id=job_id,
            **await _bytes_or_url(request, fabric, body, job_id, ready),
        )
        for (job_id, _), ready in zip(order.jobs, made, strict=True)
    ]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        size=order.size,
        output_format=body.output_format,
        metadata=Metadata.model_validate(made[0].provenance.model_dump()),
    )


async def _bytes_or_url(
    request: Request, fabric: Fabric, body: ImageRequest, job_id: str, ready: ImageReady
) -> dict[str, str]:
    if body.response_format == "url":
        return {"url": str(request.url_for("get_image", job_id=job_id))}
    return {"b64_json": _base64(await fabric.blobs.get(ready.image))}


async def _stream(
    fabric: Fabric, order: painting.Order, scribe: "_Scribe"
) -> AsyncGenerator[bytes, None]:
    """Every event of every job as it comes; a picture as soon as it is finished."""
    told: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def tell(index: int, event: Event) -> None:
        told.put_nowait((index, event))

    work = fabric.in_background(painting.paint(fabric, order, tell))
    work.add_done_callback(lambda _: told.put_nowait(None))
    beats = streams.with_heartbeats(_drain(told), fabric.settings.heartbeat_s)
    try:
        async with aclosing(beats):
            async for item in beats:
                yield streams.HEARTBEAT if item is None else await scribe.write(*item)
        await work
    except GessoError as error:
        yield streams.failure(error)
    finally:
        work.cancel()


async def _drain(
    told: "asyncio.Queue[tuple[int, Event] | None]",
) -> AsyncIterator[tuple[int, Event]]:
    while (item := await told.get()) is not None:
        yield item


class _Scribe:
    """Bus events in the words of OpenAI's image streaming."""

    def __init__(
        self, request: Request, fabric: Fabric, order: painting.Order, body: ImageRequest
    ) -> None:
        self.request, self.fabric, self.order, self.body = request, fabric, order, body
        self.began = time.monotonic()
        self._steps = [(0, 0, 0.0)] * len(order.jobs)
        self._previews = [0] * len(order.jobs)

    async def write(self, index: int, event: Event) -> bytes:
        """One event for one event: previews, finished pictures, and progress for all else."""
        if isinstance(event, JobPreview):
            return self._partial(index, event)
        if not isinstance(event, JobText):
            at = event if isinstance(event, JobProgress) else event.state
            self._steps[index] = (at.step, at.total_steps, at.progress)
        if isinstance(event, JobStateChanged) and event.state.status == "succeeded":
            return await self._completed(index, painting.result_of(event.state))
        return self._say("progress", index)

    async def _completed(self, index: int, ready: ImageReady) -> bytes:
        job_id = self.order.jobs[index][0]
        return self._say(
            "completed",
            index,
            **await _bytes_or_url(self.request, self.fabric, self.body, job_id, ready),
            created_at=int(time.time()),
            size=self.order.size,
            output_format=self.body.output_format,
            seed=ready.seed,
            seconds=round(time.monotonic() - self.began, 3),
            metadata=ready.provenance.model_dump(mode="json"),
        )

    def _partial(self, index: int, event: JobPreview) -> bytes:
        number, self._previews[index] = self._previews[index], self._previews[index] + 1
        return self._say(
            "partial_image",
            index,
            partial_image_index=number,
            b64_json=_base64(event.image),
            created_at=int(time.time()),
            size=self.order.size,
            output_format=IMAGE_TYPES.get(event.media_type, "webp"),
        )

    def _say(self, what: str, index: int, **more: Any) -> bytes:
        name = f"image_generation.{what}"
        step, total, progress = self._steps[index]
        about = {"type": name, "index": index, "job_id": self.order.jobs[index][0]}
        at = {"step": step, "total_steps": total, "progress": progress}
        return streams.event(name, {**about, **at, **more})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
