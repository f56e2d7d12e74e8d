"""``/v1/models``: what the services behind this gateway can do."""

from fastapi import APIRouter
from gesso_contracts.base import ModelName
from gesso_core.errors import UnknownModel

from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.problems import documented
from gesso_services.gateway.schemas import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=documented(401, 429, 500))
async def list_models(_: Caller, models: Models) -> ModelList:
    """Every model that is served, the default one first."""
    return ModelList(data=await _all(models))


@router.get("/{model}", responses=documented(401, 404, 422, 429, 500))
async def get_model(model: ModelName, _: Caller, models: Models) -> Model:
    """One model."""
    known = {one.id: one for one in await _all(models)}
    if model not in known:
        raise UnknownModel(model, known)
    return known[model]


async def _all(models: Models) -> list[Model]:
    painters = await models.models("text-to-image")
    coders = await models.models("autoencoder")
    return [models.describe(entry) for entry in (*painters.values(), *coders.values())]
