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
    """Every model that is served, those that draw first."""
    return ModelList(data=list((await models.describe_all()).values()))


@router.get("/{model}", responses=documented(401, 404, 422, 429, 500))
async def get_model(model: ModelName, _: Caller, models: Models) -> Model:
    """One model."""
    known = await models.describe_all()
    if model not in known:
        raise UnknownModel(model, known)
    return known[model]
