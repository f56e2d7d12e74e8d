"""``/v1/judgements``: a model that sees says how well pictures show a prompt."""

import time
from typing import Final

from fastapi import APIRouter, Depends
from gesso_contracts import JudgeImages

from gesso_services.gateway import best_of, uploads
from gesso_services.gateway.admission import open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.problems import documented
from gesso_services.gateway.schemas import Judgement, JudgementRequest

PATH: Final = "/v1/judgements"
router = APIRouter(tags=["chat"])


@router.post(
    PATH,
    responses=documented(400, 401, 404, 413, 422, 429, 500, 503, 507),
    dependencies=[Depends(open_place)],
)
async def judge(_: Caller, body: JudgementRequest, fabric: Here, models: Models) -> Judgement:
    """Score each picture: the probability that the model says yes when it is asked whether the
    picture shows `prompt`.
    """
    served = await models.find("judge", body.model)
    await best_of.check_prompt(fabric, served, body.prompt)
    intake = uploads.Intake(fabric, inline_bytes=uploads.INLINE_BYTES_PER_CALL)
    images = [
        await intake.picture(_bytes(text, f"images.{index}"), f"images.{index}")
        for index, text in enumerate(body.images)
    ]
    question = JudgeImages(model=served.name, prompt=body.prompt, images=images)
    judged = await best_of.judge(fabric, served, question)
    return Judgement(created=int(time.time()), model=served.name, scores=judged.scores)


def _bytes(text: str, field: str) -> bytes:
    """What is not plain base64 has to be a ``data:`` URL."""
    read = uploads.from_data_url if ":" in text[:200] else uploads.from_base64
    return read(text, field)
