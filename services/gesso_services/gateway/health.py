"""``/health`` for whoever starts and restarts us, ``/metrics`` for whoever measures us."""

import asyncio

from fastapi import APIRouter, Request, Response
from gesso_core.errors import GessoError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gesso_services.gateway.admission import Door
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.edge import EdgeMetrics
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.schemas import Health

router = APIRouter(tags=["operation"])


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """This process answers."""
    return {"live": True}


@router.get("/health/ready", responses={503: {"model": Health, "description": "Not yet."}})
async def ready(response: Response, fabric: Here, models: Models) -> Health:
    """The broker is there and a real request has gone through every required service."""
    names = fabric.settings.required_services
    answers = await asyncio.gather(*(models.health(name) for name in names))
    services = dict(zip(names, answers, strict=True))
    well = fabric.is_connected and all(answer.ready for answer in answers)
    response.status_code = 200 if well else 503
    response.headers["Cache-Control"] = "no-store"
    return Health(ready=well, broker=fabric.is_connected, services=services)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, fabric: Here, door: Door) -> Response:
    """What this copy of the gateway counts, in the Prometheus text format."""
    for service in fabric.settings.required_services:
        try:
            await door.depth(service)
        except GessoError:
            break  # without a broker there is no depth, and the counters still count
    counted: EdgeMetrics = request.app.state.metrics
    return Response(generate_latest(counted.registry), media_type=CONTENT_TYPE_LATEST)
