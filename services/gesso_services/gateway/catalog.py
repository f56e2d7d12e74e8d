"""Which models are behind the gateway, which service has them, and what may be asked of each.

The services say what they serve; while none answers (it starts, or is scaled to zero) the last
answer counts, and before the first one the registry does for the services that have to be there: a
job waits in the queue anyway.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final

from fastapi import Depends, Request
from gesso_contracts import AskReady, ModelInUse, ServiceReady, operations
from gesso_core.errors import GessoError, InvalidRequest, UnknownModel
from gesso_core.registry import MODELS, Family, ModelEntry, Task

from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.problems import EdgeError
from gesso_services.gateway.schemas import Model, ServiceHealth
from gesso_services.runtime import rpc

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
LONGEST = 4
ROUND_TO = 32  # the sides of the sizes that are offered
AREA_LIMIT = 4  # a picture may have so many times the pixels of the model's native size


@dataclass(frozen=True)
class Work:
    """Work that can be asked for: the task that a model must have, and the words for it."""

    task: Task
    words: str


@dataclass(frozen=True)
class Home:
    """A service: the families that it serves, and what a folder with a name of its own can do."""

    families: tuple[Family, ...]
    tasks: tuple[Task, ...]


WORK: Final[Mapping[str, Work]] = {
    "generate-image": Work("text-to-image", "draw a picture from text"),
    "vary-image": Work("text-to-image", "vary a picture"),
    "generate-video": Work("text-to-video", "make a video"),
    "answer": Work("image-to-text", "answer in a chat"),
    "judge": Work("image-to-text", "judge pictures"),
    "reconstruct": Work("autoencoder", "encode and decode a picture"),
    "segment": Work("segmentation", "cut out what a click or a box points at"),
    "annotate-text": Work("text-annotation", "label the characters of words"),
    "annotate-cars": Work("car-annotation", "label cars"),
    "draw-signs": Work("text-annotation", "label the signs that are drawn"),
}
HOMES: Final[Mapping[str, Home]] = {
    "diffusion": Home(("sana",), ("text-to-image",)),
    "autoregressive": Home(("hart", "vila-u"), ("text-to-image", "image-to-text", "text-to-video")),
    "autoencoder": Home(("dc-ae", "vila-u-tower"), ("autoencoder",)),
    "annotation": Home(("char-sam", "slf", "sam"), ("segmentation",)),
}


@dataclass(frozen=True)
class Served:
    """A model and the service that has it."""

    entry: ModelEntry
    service: str

    @property
    def name(self) -> str:
        """How the service calls it."""
        return self.entry.name


class Catalog:
    """The models that the services answer for."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._served: dict[str, list[str]] = {}
        self._in_use: dict[str, ModelInUse] = {}
        self._missing: dict[str, Mapping[str, str]] = {}
        self._asked_at: dict[str, float] = {}
        self._questions: dict[str, asyncio.Task[ServiceHealth]] = {}

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
        self._missing[service] = answer.missing
        detail = f"{answer.running} of {answer.slots} slots are busy"
        return ServiceHealth(
            ready=answer.ready, models=answer.models, missing=answer.missing, detail=detail
        )

    async def models(self, work: str) -> dict[str, Served]:
        """The models that can do ``work`` (a key of ``WORK``), in the order of their services."""
        able: dict[str, Served] = {}
        for served in await self._of(_services_for(work)):
            if WORK[work].task in served.entry.tasks:
                able.setdefault(served.name, served)
        return able

    async def find(self, work: str, name: str | None, *, field: str = "model") -> Served:
        """The model of that name, or the default one, for ``work``.

        404 lists what there is; a model that is here but cannot do it is refused with those that
        can. ``field`` is where the name came from.
        """
        models = await self.models(work)
        if name is None:
            default = self._default(WORK[work].task)
            name = default if default in models else next(iter(models), default)
        if name in models:
            return models[name]
        able = f"use {' or '.join(models)}" if models else "no model of this server can"
        sentence = f"the model {name[:80]!r} cannot {WORK[work].words} here; {able}"
        if not name:
            sentence = f"no model of this server can {WORK[work].words}; /v1/models lists them"
        if models and name not in {served.name for served in await self._of(HOMES)}:
            sentence = UnknownModel(name, models).message
        raise EdgeError(404, UnknownModel.code, sentence, field=field)

    async def describe_all(self) -> dict[str, Model]:
        """Every model as ``/v1/models`` shows it, those that draw first."""
        shown: dict[str, Model] = {}
        for served in await self._of(HOMES):
            entry = served.entry
            if (known := shown.get(entry.name)) is not None:
                tasks = [*known.tasks, *(task for task in entry.tasks if task not in known.tasks)]
                shown[entry.name] = known.model_copy(update={"tasks": tasks})
            else:
                shown[entry.name] = self._describe(served)
        return shown

    def _describe(self, served: Served) -> Model:
        in_use = self._in_use.get(served.name)
        told = in_use.model_dump(include={"quantization", "weight_bytes"}) if in_use else {}
        missing = self._missing.get(served.service, {}).get(served.name)
        return describe(served.entry).model_copy(update=told | {"missing": missing})

    def _default(self, task: Task) -> str:
        settings = self.fabric.settings
        defaults: dict[Task, str] = {
            "text-to-image": settings.default_model,
            "image-to-text": settings.default_seeing_model,
            "autoencoder": settings.default_autoencoder,
        }
        return defaults.get(task, "")

    async def _of(self, services: Iterable[str]) -> list[Served]:
        """Every model of these services, in their order."""
        services = list(services)
        await asyncio.gather(*(self._refresh(service) for service in services))
        return [
            Served(self._entry(name, service), service)
            for service in services
            for name in self._names(service)
        ]

    def _names(self, service: str) -> list[str]:
        if service in self._served:
            return self._served[service]
        if service not in self.fabric.settings.required_services:
            return []
        families = HOMES[service].families
        return [name for name, entry in MODELS.items() if entry.family in families]

    def _entry(self, name: str, service: str) -> ModelEntry:
        """What the registry says, or what can be said of a folder under a name of its own."""
        home = HOMES[service]
        entry = MODELS.get(name)
        if entry is not None:
            # A tokenizer may go by the name of its model; here it only encodes and decodes.
            return replace(entry, tasks=home.tasks) if service == "autoencoder" else entry
        entry = ModelEntry(name=name, family=home.families[-1], tasks=home.tasks, summary="")
        in_use = self._in_use.get(name)
        if in_use is None:
            return entry
        told = tuple(task for task in home.tasks if task in in_use.tasks)
        return replace(
            entry,
            native_size=in_use.native_size,
            steps=in_use.steps or entry.steps,
            tasks=told or home.tasks,
        )

    async def _refresh(self, service: str) -> None:
        age = time.monotonic() - self._asked_at.get(service, float("-inf"))
        if age >= self.fabric.settings.models_ttl_s:
            self._asked_at[service] = time.monotonic()
            self._questions[service] = self.fabric.in_background(self.health(service))
        if service not in self._served:  # whoever asks at the same time waits as well
            await asyncio.wait({self._questions[service]})


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
    about = Model(id=entry.name, created=0, task=entry.task, tasks=list(entry.tasks))
    if not {"text-to-image", "text-to-video"} & set(entry.tasks):
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


def _services_for(work: str) -> list[str]:
    """The services that have a job or a call of that name."""
    return [
        name
        for name in HOMES
        if work in operations.JOBS.get(name, {}) or work in operations.RPC.get(name, {})
    ]


def _size(side: int, wide: int, high: int) -> str:
    scale = side / (wide * high) ** 0.5
    width, height = (ROUND_TO * round(scale * part / ROUND_TO) for part in (wide, high))
    return f"{width}x{height}"
