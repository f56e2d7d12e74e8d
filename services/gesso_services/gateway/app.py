"""The gateway as one FastAPI application: routes, edge, error handlers, and the first page.

create_app()                                    settings from the environment
create_app(GatewaySettings(...), bus_settings)  for tests and for `gesso up`
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from gesso_services.gateway import (
    annotation_drawn,
    annotations,
    chat,
    health,
    images,
    jobs,
    judgements,
    label_studio,
    models,
    problems,
    reconstructions,
    videos,
)
from gesso_services.gateway.admission import Admission
from gesso_services.gateway.auth import KeyRing
from gesso_services.gateway.catalog import Catalog
from gesso_services.gateway.edge import Edge, EdgeMetrics
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.settings import BusSettings

PAGE = Path(__file__).with_name("page")
DESCRIPTION = """Text to pictures and videos, and talk about them, in the words of OpenAI's API;
labels for pictures; durable jobs behind it.

Errors have one shape: RFC 9457 problem details with OpenAI's `error` object inside.
"""


class GatewayApp(FastAPI):
    """FastAPI, with the one error shape of all routes in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        document["components"]["schemas"].setdefault("ErrorBody", problems.error_schema())
        _whole_numbers(document)
        return document


def create_app(
    settings: GatewaySettings | None = None, bus_settings: BusSettings | None = None
) -> FastAPI:
    """The application; it connects to the broker when it starts."""
    settings = settings or GatewaySettings()
    app = GatewayApp(
        title="gesso",
        version=version("gesso"),
        description=DESCRIPTION,
        lifespan=_lifespan,
        # The documentation pages load scripts from elsewhere; /openapi.json is all that is needed.
        docs_url=None,
        redoc_url=None,
    )
    _equip(app, settings, bus_settings or BusSettings())
    for router in (
        health.router,
        models.router,
        reconstructions.router,
        images.router,
        videos.router,
        chat.router,
        judgements.router,
        annotations.router,
        annotation_drawn.router,
        label_studio.router,
        jobs.router,
    ):
        app.include_router(router)
    problems.install(app)
    _add_page(app)
    return app


def _equip(app: FastAPI, settings: GatewaySettings, bus_settings: BusSettings) -> None:
    state = app.state
    state.keys = KeyRing(settings.keys())
    state.metrics = EdgeMetrics()
    state.fabric = Fabric(settings, bus_settings)
    state.catalog = Catalog(state.fabric)
    state.admission = Admission(state.fabric, state.metrics.registry)
    app.add_middleware(
        Edge,
        metrics=state.metrics,
        max_body_bytes=settings.max_body_bytes,
        max_body_bytes_of={
            reconstructions.PATH: settings.max_upload_bytes,
            images.VARIATIONS: settings.max_upload_bytes,
            f"{jobs.PATH}/": settings.max_upload_bytes,
            chat.PATH: settings.max_conversation_bytes,
            judgements.PATH: settings.max_conversation_bytes,
            annotations.PATH: settings.max_upload_bytes,
            label_studio.PREDICT: settings.max_conversation_bytes,
            label_studio.WEBHOOK: settings.max_conversation_bytes,
        },
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    fabric: Fabric = app.state.fabric
    fabric.in_background(fabric.open())
    try:
        yield
    finally:
        await fabric.close()


def _whole_numbers(node: Any) -> None:
    """FastAPI writes limits as floats; 2**63 has to stay exact."""
    if isinstance(node, list):
        for one in node:
            _whole_numbers(one)
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, float) and value.is_integer():
                node[name] = int(value)
            _whole_numbers(value)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def first_page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/annotate", include_in_schema=False)
    async def annotation_page() -> FileResponse:
        return FileResponse(PAGE / "annotate.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
