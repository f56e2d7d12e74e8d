"""What made a picture, in full: enough to make it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Protocol

from gesso_core.lora.stack import AppliedLora
from gesso_core.pipelines.denoiser import Denoiser, Identity
from gesso_core.pipelines.draft import Draft
from gesso_core.text.domain import Verdict


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Model, weights and every choice; ``in_domain`` is None where the model has no domain list.

    The last three are for models that draw tokens, None for all others and where nothing was asked.
    """

    model: str
    revision: str
    weights_sha256: str
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    quantization: str
    versions: Mapping[str, str]
    in_domain: bool | None = None
    suggestions: tuple[str, ...] = ()
    loras: tuple[AppliedLora, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    keep: int | None = None


class Choices(Protocol):
    """What every kind of recipe says."""

    @property
    def model(self) -> str:
        """Name of the model."""
        ...

    @property
    def seed(self) -> int:
        """Where the random draws began."""
        ...

    @property
    def sampler(self) -> str:
        """How it was drawn."""
        ...

    @property
    def steps(self) -> int:
        """In how many steps."""
        ...

    @property
    def guidance_scale(self) -> float:
        """How closely the prompt was followed."""
        ...


def provenance_of(denoiser: Denoiser, draft: Draft) -> Provenance:
    """The provenance of a picture that ``denoiser`` draws or has drawn."""
    return provenance(
        draft.recipe,
        denoiser.identity,
        denoiser.judge(draft.recipe.prompt),
        loras=() if draft.loras is None else draft.loras.uses,
    )


def provenance(
    recipe: Choices,
    identity: Identity,
    verdict: Verdict,
    *,
    loras: tuple[AppliedLora, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
    keep: int | None = None,
) -> Provenance:
    """The provenance of what the weights ``identity`` draw after ``recipe``."""
    return Provenance(
        model=recipe.model,
        revision=identity.revision,
        weights_sha256=identity.weights_sha256,
        seed=recipe.seed,
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        quantization=identity.quantization,
        versions=library_versions(),
        in_domain=verdict.in_domain,
        suggestions=verdict.suggestions,
        loras=loras,
        top_k=top_k,
        top_p=top_p,
        keep=keep,
    )


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of what computes the numbers."""
    return {name: version(name) for name in ("gesso", "torch")}
