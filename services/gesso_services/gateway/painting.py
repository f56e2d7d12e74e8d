"""From requests for pictures to jobs, and from finished jobs to pictures.

Picture ``i`` of a request is a job of its own with seed ``seed + i``.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

from gesso_contracts import GenerateImage, ImageReady, LoraUse, VaryImage
from gesso_contracts.limits import SEED_LIMIT
from gesso_core.errors import InvalidRequest
from gesso_core.registry import ModelEntry

from gesso_services.gateway import orders
from gesso_services.gateway.best_of import Chosen, Contest
from gesso_services.gateway.catalog import Served, check_size
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.orders import Order
from gesso_services.gateway.schemas import ImageRequest, VariationRequest, pixels_of
from gesso_services.gateway.uploads import Intake

M = TypeVar("M", bound=GenerateImage)
UNNAMED = "the same picture, a little different"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who asks, and the key under which the same request again is the same order."""

    caller: str
    idempotency_key: str | None


def plan(body: ImageRequest, served: Served, claim: Claim) -> Order[GenerateImage]:
    """The jobs for ``body``. The same key from the same caller gives the same ids and seeds."""
    entry, count = served.entry, max(body.n, body.best_of or 0)
    width, height = _size(body.size, entry)
    name, seed = _name_and_seed(claim, body.seed, count)
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
        preview_every=_preview_every(body, body.steps or entry.steps),
        loras=[LoraUse(name=use.name, strength=use.strength) for use in body.loras],
        top_k=body.top_k,
        top_p=body.top_p,
    )
    return _order("generate-image", served, name, first, count, claim)


async def plan_variations(
    body: VariationRequest, served: Served, claim: Claim, intake: Intake
) -> Order[VaryImage]:
    """The jobs for variations of a picture, which is taken in once all else is right."""
    entry = served.entry
    width, height = _size(body.size, entry)
    name, seed = _name_and_seed(claim, body.seed, body.n)
    keep = kept(body.keep, entry)
    first = VaryImage(
        model=entry.name,
        prompt=UNNAMED if body.prompt is None else body.prompt,
        width=width,
        height=height,
        seed=seed,
        guidance_scale=body.guidance_scale,
        output_format=body.output_format,
        preview_every=_preview_every(body, entry.steps),
        top_k=body.top_k,
        top_p=body.top_p,
        image=await intake.picture(await body.image.read(), "image"),
        keep=keep,
    )
    return _order("vary-image", served, name, first, body.n, claim)


async def paint(
    fabric: Fabric, order: Order[GenerateImage], contest: Contest | None = None
) -> list[Chosen]:
    """The pictures of ``order``, or the best ones of the ``contest``, best first."""
    states = await orders.fulfil(fabric, order)
    made = [orders.result_of(state, ImageReady) for state in states]
    if contest is not None:
        return await contest.choose(fabric, made)
    return [Chosen(index, ready) for index, ready in enumerate(made)]


def size_of(order: Order[GenerateImage]) -> str:
    """``WIDTHxHEIGHT`` of every picture."""
    first = order.jobs[0][1]
    return f"{first.width}x{first.height}"


def _size(size: str, entry: ModelEntry) -> tuple[int, int]:
    width, height = pixels_of(size, (entry.native_size, entry.native_size))
    check_size(entry, width, height)
    return width, height


def _name_and_seed(claim: Claim, seed: int | None, count: int) -> tuple[str, int]:
    name, drawn = orders.name_and_seed(claim.caller, claim.idempotency_key, "img")
    seed = drawn if seed is None else seed
    if seed + count > SEED_LIMIT:
        raise InvalidRequest(
            f"seed {seed} leaves no room for {count} pictures with seeds below 2**63", field="seed"
        )
    return name, seed


def _order(kind: str, served: Served, name: str, first: M, count: int, claim: Claim) -> Order[M]:
    return Order(
        service=served.service,
        kind=kind,
        jobs=tuple(
            (f"{name}-{i}", first.model_copy(update={"seed": first.seed + i})) for i in range(count)
        ),
        lasting=claim.idempotency_key is not None,
    )


def kept(keep: int | None, entry: ModelEntry) -> int:
    """How many scales or rows stay: half of the scales where nothing is said; a model that sees
    draws anew.
    """
    sees = "image-to-text" in entry.tasks
    if keep is None:
        return 0 if sees else entry.steps // 2
    if keep == 0 and not sees:
        raise InvalidRequest(
            f"keep 0: {entry.name} goes on from a picture but sees none; keep at least 1",
            field="keep",
        )
    if keep >= entry.steps:
        raise InvalidRequest(
            f"keep {keep}: {entry.name} draws in {entry.steps} steps, so that nothing would be "
            f"drawn; keep at most {entry.steps - 1}",
            field="keep",
        )
    return keep


def _preview_every(body: ImageRequest | VariationRequest, steps: int) -> int:
    if not (body.stream and body.partial_images):
        return 0
    return math.ceil(steps / (body.partial_images + 1))
