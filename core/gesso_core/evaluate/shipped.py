"""The models inside the package, each with what is measured of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from gesso_core.evaluate.hart import evaluate_hart
from gesso_core.evaluate.references import load_references
from gesso_core.evaluate.run import Measure, evaluate_autoencoder, evaluate_denoiser
from gesso_core.evaluate.vila_u import evaluate_shipped_vila_u
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.text_to_image import TextToImage


def evaluate_shipped(
    names: Iterable[str] | None = None, limit: int | None = None
) -> dict[str, list[Measure]]:
    """All measures of the models ``names``, of all of them by default.

    ``limit`` takes only the first prompts, or pictures, of each set.
    """
    return {name: EVALUATIONS[name](limit) for name in names or EVALUATIONS}


def _autoencoder(limit: int | None) -> list[Measure]:
    folder = resolve("dcae-tiny")
    return evaluate_autoencoder(load_dc_ae(folder), folder)


def _denoiser(limit: int | None) -> list[Measure]:
    return evaluate_denoiser(TextToImage.load("sana-tiny"), resolve("sana-tiny"), limit=limit)


def _hart(limit: int | None) -> list[Measure]:
    references = load_references(resolve("sana-tiny") / "references.safetensors")
    return evaluate_hart(load_hart("hart-tiny"), references, limit=limit)


EVALUATIONS: Final[Mapping[str, Callable[[int | None], list[Measure]]]] = {
    "dcae-tiny": _autoencoder,
    "sana-tiny": _denoiser,
    "hart-tiny": _hart,
    "vilau-tiny": evaluate_shipped_vila_u,
}
