"""``/v1/annotations/draw``: pictures drawn, written on and labelled by one durable job.

What is asked of the generator is worked out here: a model of the diffusion service, and the size
that it draws best, in the proportions of the picture.
"""

import math
from typing import Any, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from gesso_contracts import DrawSigns, SignsDrawn, limits
from gesso_contracts.base import JobId
from gesso_core.errors import InvalidRequest, NotFound, UnknownModel
from gesso_core.registry import ModelEntry

from gesso_services.gateway import orders, results
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.annotation_schemas import DrawBody, SignsAnnotation
from gesso_services.gateway.annotations import PATH, REFUSALS, STARTED, deliver
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import LONGEST, Models, Served
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.orders import IdempotencyKey, Order
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.schemas import pixels_of

KIND: Final = "draw-signs"
PAINTER: Final = "diffusion"
SIGN_SIZE: Final = (512, 512)  # width and height where none is given
router = APIRouter(tags=["annotations"])


@router.post(
    f"{PATH}/draw",
    response_model=SignsAnnotation,
    responses=documented(*REFUSALS) | STARTED,
    dependencies=[Depends(open_place)],
)
async def draw_signs(
    *,
    body: DrawBody,
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Draw `n` pictures, put a sign with the words into each, and label every character. The words
    are set by a font, so the labels are measured against the exact truth.
    """
    served = await models.find(KIND, body.model)
    generator = await find_generator(models, body.generator, "generator")
    width, height = _sign_size(body.size)
    name, drawn_seed = orders.name_and_seed(caller, idempotency_key, "signs")
    drawn_width, drawn_height = _drawn_size(width, height, generator.entry)
    message = DrawSigns(
        model=served.name,
        generator=generator.name,
        prompt=body.prompt,
        words=body.words,
        pictures=body.n,
        seed=drawn_seed if body.seed is None else body.seed,
        width=width,
        height=height,
        drawn_width=drawn_width,
        drawn_height=drawn_height,
        refine=body.refine,
        min_score=body.min_score,
    )
    async with door.admitted(served.service):
        await door.admit(generator.service, body.n)
    order = Order(
        service=served.service,
        kind=KIND,
        jobs=((name, message),),
        lasting=idempotency_key is not None,
    )
    return await deliver(request, fabric, order, wait=body.wait)


@router.get(
    f"{PATH}/{{job_id}}/pictures/{{index}}/{{part}}",
    response_class=Response,
    responses=documented(401, 404, 409, 422, 429, 500, 503, ok={"content": results.PICTURE}),
)
async def get_sign(
    job_id: JobId, index: int, part: Literal["image", "overlay", "truth"], _: Caller, fabric: Here
) -> Response:
    """A picture of `draw`: with its sign, with its labels over it, or the index mask of the truth,
    whose value k is its k-th character.
    """
    made = orders.result_of(await results.finished(fabric, job_id), SignsDrawn)
    if not 0 <= index < len(made.pictures):
        raise NotFound(
            f"job {job_id!r} made no picture {index}; it has {len(made.pictures)}, the first is 0"
        )
    return await results.file(fabric, getattr(made.pictures[index], part), results.PICTURE_TYPES)


async def find_generator(models: Models, name: str | None, field: str) -> Served:
    """The model of the diffusion service of that name, or its default one; 404, naming ``field``
    and the models that there are, for every other.
    """
    able = {
        served.name: served
        for served in (await models.models("generate-image")).values()
        if served.service == PAINTER
    }
    default = models.fabric.settings.default_model
    wanted = name or (default if default in able else next(iter(able), default))
    if wanted not in able:
        remedy = f"like {' or '.join(able)}" if able else "which has none now"
        raise EdgeError(
            404,
            UnknownModel.code,
            f"the model {wanted[:80]!r} draws no signs here: that is work for the models of the "
            f"service {PAINTER!r}, {remedy}",
            field=field,
        )
    return able[wanted]


def _sign_size(size: str) -> tuple[int, int]:
    """Width and height of the pictures; InvalidRequest for what no sign can stand in."""
    width, height = pixels_of(size, SIGN_SIZE)
    least, most = limits.MIN_SIGN_SIDE, limits.MAX_SIGN_SIDE
    if min(width, height) < least or max(width, height) > most:
        raise InvalidRequest(
            f"size {size!r}: a picture with a sign has {least} to {most} pixels along each side",
            field="size",
        )
    if max(width, height) > LONGEST * min(width, height):
        raise InvalidRequest(
            f"size {size!r} is longer than {LONGEST} to 1; ask for proportions up to that",
            field="size",
        )
    return width, height


def _drawn_size(width: int, height: int, entry: ModelEntry) -> tuple[int, int]:
    """What the generator draws: as many pixels as it does best, in these proportions."""
    scale, step = entry.native_size / math.sqrt(width * height), limits.SIDE_MULTIPLE
    drawn_width, drawn_height = (
        max(limits.MIN_SIDE, step * round(scale * side / step)) for side in (width, height)
    )
    return drawn_width, drawn_height
