"""``/v1/images``: pictures from text or from a picture, in OpenAI's vocabulary."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from gesso_contracts.base import JobId

from gesso_services.gateway import painting, results, streams
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.best_of import contest_of
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.orders import IdempotencyKey
from gesso_services.gateway.painting import Claim
from gesso_services.gateway.pictures import Delivery
from gesso_services.gateway.problems import documented
from gesso_services.gateway.schemas import ImageRequest, ImagesResponse, VariationRequest
from gesso_services.gateway.uploads import INLINE_BYTES_PER_JOB, Intake

VARIATIONS = "/v1/images/variations"
router = APIRouter(prefix="/v1/images", tags=["images"])
ANSWERS: dict[str, Any] = {
    "response_model": ImagesResponse,
    "response_model_exclude_none": True,
    "responses": documented(
        400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507, ok={"content": streams.DOCUMENTED}
    ),
    "dependencies": [Depends(open_place)],
}


@router.post("/generations", **ANSWERS)
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

    With `best_of` so many are drawn, `judge` looks at all of them, and the best `n` come back, best
    first; a stream then completes only those, with `rank` and `score`.
    """
    served = await models.find("generate-image", body.model)
    contest = await contest_of(body, models, fabric)
    claim = Claim(caller=caller, idempotency_key=idempotency_key)
    order = painting.plan(body, served, claim)
    await door.admit(served.service, len(order.jobs))
    return await _deliver(Delivery(request, fabric, order, body, contest), body.stream)


@router.post("/variations", **ANSWERS)
async def vary(
    *,
    body: Annotated[VariationRequest, Form(media_type="multipart/form-data")],
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Paint `n` pictures from a picture: its first `keep` scales or rows stay, the rest is drawn
    for `prompt`. Answers and streams like `/v1/images/generations`.
    """
    served = await models.find("vary-image", body.model)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB)
    claim = Claim(caller=caller, idempotency_key=idempotency_key)
    async with door.admitted(served.service, body.n):
        order = await painting.plan_variations(body, served, claim, intake)
    return await _deliver(Delivery(request, fabric, order, body), body.stream)


@router.get(
    "/{job_id}/content",
    responses=documented(401, 404, 409, 422, 429, 500, 503, 507, ok={"content": results.PICTURE}),
    response_class=Response,
    name="get_image",
)
async def get_image(job_id: JobId, _: Caller, fabric: Here) -> Response:
    """The picture of a job that succeeded."""
    return await results.picture(fabric, job_id)


async def _deliver(delivery: Delivery, stream: bool) -> Any:
    if stream:
        return streams.EventStream(delivery.stream())
    answer = await delivery.wait()
    return Response(status_code=499) if answer is None else answer
