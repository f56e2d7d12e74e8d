"""What made a picture, in full: enough to make it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from gesso_core.lora.stack import AppliedLora
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Model, weights and every choice; ``in_domain`` is None where the model has no domain list."""

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


def provenance_of(denoiser: Denoiser, draft: Draft) -> Provenance:
    """The provenance of a picture that ``denoiser`` draws or has drawn."""
    recipe = draft.recipe
    verdict = denoiser.judge(recipe.prompt)
    return Provenance(
        model=recipe.model,
        revision=denoiser.identity.revision,
        weights_sha256=denoiser.identity.weights_sha256,
        seed=recipe.seed,
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        quantization=denoiser.identity.quantization,
        versions=library_versions(),
        in_domain=verdict.in_domain,
        suggestions=verdict.suggestions,
        loras=() if draft.loras is None else draft.loras.uses,
    )


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of what computes the numbers."""
    return {name: version(name) for name in ("gesso", "torch")}
