"""Which models are behind the gateway, and what may be asked of each.

The services say what they serve; while none answers (it starts, or is scaled to zero) the last
answer counts, and before the first one the registry does: a job waits in the queue anyway.
"""

import asyncio
import time
from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Request
from gesso_contracts import AskReady, ModelInUse, ServiceReady
from gesso_core.errors import GessoError, InvalidRequest, UnknownModel
from gesso_core.registry import MODELS, ModelEntry, Task

from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.schemas import Model, ServiceHealth
from gesso_services.runtime import rpc

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
LONGEST = 4
ROUND_TO = 32  # the sides of the sizes that are offered
AREA_LIMIT = 4  # a picture may have so many times the pixels of the model's native size
SERVICE_OF: dict[Task, str] = {"text-to-image": "diffusion", "autoencoder": "autoencoder"}


class Catalog:
    """The models that the services answer for."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._served: dict[str, list[str]] = {}
        self._in_use: dict[str, ModelInUse] = {}
        self._asked_at: dict[str, float] = {}

    async def health(self, service: str) -> ServiceHealth:
        """Ask ``service`` itself whether a real warm-up went through it."""
        try:
            answer = await rpc.call(
                self.fabric.bus,
                service,
                "ready",
                AskReady(),
                ServiceReady,
                timeout=self.fabric.settings.ready_timeout_s,
            )
        except GessoError as error:
            return ServiceHealth(ready=False, detail=error.message)
        if answer.models:
            self._served[service] = answer.models
        self._in_use |= answer.in_use
        detail = f"{answer.running} of {answer.slots} slots are busy"
        return ServiceHealth(ready=answer.ready, models=answer.models, detail=detail)

    async def models(self, task: Task) -> dict[str, ModelEntry]:
        """The models for ``task``, the default one first."""
        service = SERVICE_OF[task]
        await self._refresh(service)
        known = {name: entry for name, entry in MODELS.items() if entry.task == task}
        served = self._served.get(service)
        if served is None:
            return known
        return {name: known.get(name) or self._of_folder(name, task) for name in served}

    def _of_folder(self, name: str, task: Task) -> ModelEntry:
        """A service may serve a folder under a name of its own, which no registry knows."""
        entry = ModelEntry(name=name, family="sana", tasks=(task,), summary="")
        in_use = self._in_use.get(name)
        return entry if in_use is None else replace(entry, native_size=in_use.native_size)

    async def find(self, task: Task, name: str | None) -> ModelEntry:
        """The model of that name, or the default one; ``UnknownModel`` lists what there is."""
        models = await self.models(task)
        settings = self.fabric.settings
        default = (
            settings.default_model if task == "text-to-image" else settings.default_autoencoder
        )
        if name is None:
            name = default if default in models else next(iter(models), default)
        if name not in models:
            raise UnknownModel(name, models)
        return models[name]

    def describe(self, entry: ModelEntry) -> Model:
        """The entry as ``/v1/models`` shows it, with what its service says of it."""
        in_use = self._in_use.get(entry.name)
        told = in_use.model_dump(include={"quantization", "weight_bytes"}) if in_use else {}
        return describe(entry).model_copy(update=told)

    async def _refresh(self, service: str) -> None:
        age = time.monotonic() - self._asked_at.get(service, float("-inf"))
        if age < self.fabric.settings.models_ttl_s:
            return
        self._asked_at[service] = time.monotonic()
        question = self.fabric.in_background(self.health(service))
        if service not in self._served:
            await asyncio.wait({question})


async def of(request: Request) -> Catalog:
    """The catalog of the application that serves ``request``."""
    catalog: Catalog = request.app.state.catalog
    return catalog


Models = Annotated[Catalog, Depends(of)]


def check_size(entry: ModelEntry, width: int, height: int) -> None:
    """``InvalidRequest`` when a picture of that size is more than the model can do."""
    examples = f"for example {', '.join(sizes_of(entry))}"
    if max(width, height) > LONGEST * min(width, height):
        raise InvalidRequest(
            f"size {width}x{height} is longer than {LONGEST} to 1; ask for proportions up to that, "
            f"{examples}",
            field="size",
        )
    most = AREA_LIMIT * entry.native_size**2
    if width * height > most:
        raise InvalidRequest(
            f"size {width}x{height} is {width * height:,} pixels; {entry.name} paints at most "
            f"{most:,}, {examples}",
            field="size",
        )


def sizes_of(entry: ModelEntry) -> list[str]:
    """Sizes worth offering: the native one, and the usual shapes where the model knows them."""
    shapes = ASPECTS if entry.aspect_bins else ASPECTS[:1]
    return [_size(entry.native_size, wide, high) for wide, high in shapes]


def describe(entry: ModelEntry) -> Model:
    """The entry as ``/v1/models`` shows it."""
    about = Model(id=entry.name, created=0, task=entry.task)
    if entry.task != "text-to-image":
        return about
    return about.model_copy(
        update={
            "default_size": f"{entry.native_size}x{entry.native_size}",
            "sizes": sizes_of(entry),
            "steps": entry.steps,
            "guidance_scale": entry.guidance_scale,
            "sampler": entry.sampler,
        }
    )


def _size(side: int, wide: int, high: int) -> str:
    scale = side / (wide * high) ** 0.5
    width, height = (ROUND_TO * round(scale * part / ROUND_TO) for part in (wide, high))
    return f"{width}x{height}"
