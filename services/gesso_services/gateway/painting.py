"""From one image request to jobs, and from their events to pictures.

Picture ``i`` of a request is a job of its own with seed ``seed + i``. A caller that leaves
withdraws its jobs; with an ``Idempotency-Key`` they go on, and the same request again joins them.
"""

import asyncio
import hashlib
import math
import secrets
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from gesso_contracts import GenerateImage, ImageReady, JobState, JobStateChanged, LoraUse
from gesso_contracts.limits import SEED_LIMIT
from gesso_core.errors import GessoError, InvalidRequest
from gesso_core.registry import ModelEntry

from gesso_services.gateway.catalog import check_size
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.problems import EdgeError
from gesso_services.gateway.schemas import ImageRequest, pixels_of
from gesso_services.runtime.job_events import Event, follow
from gesso_services.runtime.problems import error_of

SERVICE, KIND = "diffusion", "generate-image"
RANDOM_SEEDS = 2**32  # small enough for a JavaScript number
Tell = Callable[[int, Event], Awaitable[None]]


@dataclass(frozen=True)
class Order:
    """The jobs of one request; ``lasting`` ones outlive the connection that asked for them."""

    jobs: tuple[tuple[str, GenerateImage], ...]
    lasting: bool

    @property
    def size(self) -> str:
        """``WIDTHxHEIGHT`` of every picture."""
        first = self.jobs[0][1]
        return f"{first.width}x{first.height}"


def plan(
    body: ImageRequest, entry: ModelEntry, *, caller: str, idempotency_key: str | None
) -> Order:
    """The jobs for ``body``. The same key from the same caller gives the same ids and seeds."""
    width, height = pixels_of(body.size, (entry.native_size, entry.native_size))
    check_size(entry, width, height)
    name, drawn = _identity(caller, idempotency_key)
    seed = drawn if body.seed is None else body.seed
    if seed + body.n > SEED_LIMIT:
        raise InvalidRequest(
            f"seed {seed} leaves no room for {body.n} pictures with seeds below 2**63", field="seed"
        )
    first = GenerateImage(
        model=entry.name,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        seed=seed,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        sampler=body.sampler,
        output_format=body.output_format,
        preview_every=_preview_every(body, entry),
        loras=[LoraUse(name=use.name, strength=use.strength) for use in body.loras],
    )
    return Order(
        jobs=tuple(
            (f"{name}-{i}", first.model_copy(update={"seed": seed + i})) for i in range(body.n)
        ),
        lasting=idempotency_key is not None,
    )


async def paint(fabric: Fabric, order: Order, tell: Tell | None = None) -> list[ImageReady]:
    """Submit every job of ``order``, pass on what happens to ``tell``, and return the results.

    Raises what the first failed job failed with, and 504 at the deadline. Whenever this is left
    without all results, the jobs that are not ``lasting`` are withdrawn.
    """
    try:
        return await _all(fabric, order, tell)
    except TimeoutError as error:
        raise EdgeError(
            504,
            "deadline_exceeded",
            f"the pictures were not ready within {fabric.settings.deadline_s:g} s; ask for fewer "
            "or smaller ones, or submit jobs with PUT /v1/jobs/{id} and come back",
        ) from error
    except ExceptionGroup as group:
        raise _first(group) from group


async def withdraw(fabric: Fabric, order: Order) -> None:
    """Cancel every job of ``order`` that is not final yet."""
    for job_id, _ in order.jobs:
        with suppress(GessoError):  # it may never have been accepted
            await fabric.jobs.cancel(job_id)


def result_of(state: JobState) -> ImageReady:
    """What a final job made; raises what it failed with."""
    if state.problem is not None:
        raise error_of(state.problem)
    if state.status == "succeeded":
        if state.result_schema != ImageReady.schema_name():
            raise EdgeError(409, "not_a_picture", f"job {state.id} made no picture")
        return ImageReady.model_validate(state.result)
    raise EdgeError(409, "cancelled", f"job {state.id} was cancelled; submit it under a new id")


async def _all(fabric: Fabric, order: Order, tell: Tell | None) -> list[ImageReady]:
    try:
        async with asyncio.timeout(fabric.settings.deadline_s), asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_one(fabric, index, job_id, request, tell))
                for index, (job_id, request) in enumerate(order.jobs)
            ]
    except BaseException:
        if not order.lasting:
            fabric.in_background(withdraw(fabric, order))
        raise
    return [task.result() for task in tasks]


async def _one(
    fabric: Fabric, index: int, job_id: str, request: GenerateImage, tell: Tell | None
) -> ImageReady:
    async with follow(fabric.jobs, job_id, new=True) as events:
        state, _ = await fabric.jobs.submit(SERVICE, KIND, request, job_id=job_id)
        events.add(JobStateChanged(state=state))
        async for event in events:
            if isinstance(event, JobStateChanged):
                state = event.state
            if tell is not None:
                await tell(index, event)
    return result_of(state)


def _first(error: Exception) -> Exception:
    """The error of the job that failed first, out of the group that the tasks raised."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _identity(caller: str, idempotency_key: str | None) -> tuple[str, int]:
    """Name and seed for the jobs of a request: drawn, or derived from the key."""
    if idempotency_key is None:
        return f"img-{uuid.uuid4().hex}", secrets.randbelow(RANDOM_SEEDS)
    digest = hashlib.sha256(f"{caller}\0{idempotency_key}".encode()).digest()
    return f"key-{digest[:16].hex()}", int.from_bytes(digest[16:20])


def _preview_every(body: ImageRequest, entry: ModelEntry) -> int:
    if not (body.stream and body.partial_images):
        return 0
    return math.ceil((body.steps or entry.steps) / (body.partial_images + 1))
