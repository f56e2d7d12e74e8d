"""Draw the fixed prompts with a Sana, score them, and compare with the gates; the autoencoder."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gesso_core.evaluate import prompts as fixed
from gesso_core.evaluate.prompts import EvaluationPrompt
from gesso_core.evaluate.references import References, load_references
from gesso_core.evaluate.retrieval import score
from gesso_core.metrics import psnr, ssim
from gesso_core.models.dc_ae import DCAE
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.train.compose import COLORS, composite, palette_colors, shrink, sprites_to_float

SIZE = 64
BATCH = 50
GATES = "gates.json"

# Smallest allowed value of every gated measure; the others are only reported.
AUTOENCODER_GATES = {"held-out PSNR (dB)": 26.0, "held-out SSIM": 0.81}
DENOISER_GATES = {
    "held-in top-1": 0.90,
    "held-in background": 0.95,
    "held-out top-1": 0.80,
    "held-out background": 0.95,
    "trained keywords top-5": 0.75,
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the report; ``at_least`` is None where there is no gate."""

    name: str
    value: float
    at_least: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the gate, if any, is met."""
        return self.at_least is None or self.value >= self.at_least


PROMPT_SETS: dict[str, Callable[[References], list[EvaluationPrompt]]] = {
    "held-in": fixed.held_in,
    "held-out": fixed.held_out,
    "trained keywords": fixed.trained_keywords,
    "trained keywords, new wording": partial(fixed.trained_keywords, template=fixed.NEW_WORDING),
    "reserved keywords": fixed.reserved_keywords,
    "everyday words": fixed.everyday,
}


def evaluate_denoiser(
    pipeline: TextToImage, folder: Path, seed: int = 0, limit: int | None = None
) -> list[Measure]:
    """Scores of every prompt set; ``limit`` prompts of each where given."""
    references = load_references(folder / "references.safetensors")
    measures: list[Measure] = []
    for name, build in PROMPT_SETS.items():
        prompts = build(references)[:limit]
        started = time.process_time()
        pictures = draw(pipeline, [prompt.text for prompt in prompts], seed)
        seconds = (time.process_time() - started) / len(prompts)
        scores = asdict(score(prompts, pictures, references))
        labels = {"top1": "top-1", "top5": "top-5", "styled": "top-1 and style"}
        for key in ("top1", "top5", "styled", "background"):
            label = f"{name} {labels.get(key, key)}"
            measures.append(
                Measure(name=label, value=scores[key], at_least=DENOISER_GATES.get(label))
            )
        measures.append(Measure(name=f"{name} CPU seconds per picture", value=seconds))
    return measures


def evaluate_autoencoder(model: DCAE, folder: Path) -> list[Measure]:
    """PSNR and SSIM on the held-out sprites in the folder."""
    pixels = load_file(folder / "held_out_sprites.safetensors")["pixels"]
    colors = palette_colors(torch.arange(len(pixels)) % len(COLORS))
    pictures = shrink(composite(sprites_to_float(pixels), colors), SIZE)
    with torch.no_grad():
        decoded = model(pictures)
    values = {
        "held-out PSNR (dB)": float(psnr(decoded, pictures).mean()),
        "held-out SSIM": float(ssim(decoded, pictures).mean()),
    }
    gates = AUTOENCODER_GATES
    return [Measure(name=k, value=v, at_least=gates.get(k)) for k, v in values.items()]


def draw(pipeline: TextToImage, texts: Sequence[str], seed: int) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1]; prompt number i is drawn with seed ``seed + i``."""
    pictures: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        requests = [
            GenerationRequest(prompt=text, width=SIZE, height=SIZE, seed=seed + start + i)
            for i, text in enumerate(texts[start : start + BATCH])
        ]
        for picture in pipeline(*requests):
            pictures.append(torch.from_numpy(picture.pixels_HWC.copy()).permute(2, 0, 1))
    return torch.stack(pictures).float() / 127.5 - 1


def stored_gates(folder: Path) -> dict[str, float]:
    """The gates written beside the weights, empty where there are none."""
    path = folder / GATES
    if not path.exists():
        return {}
    gates: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {name: entry["at_least"] for name, entry in gates.items() if "at_least" in entry}


def write_gates(measures: Sequence[Measure], folder: Path) -> None:
    """Keep gates and measured values beside the weights."""
    entries = {
        m.name: {"measured": round(m.value, 4)}
        | ({} if m.at_least is None else {"at_least": m.at_least})
        for m in measures
    }
    (folder / GATES).write_text(json.dumps(entries, indent=2) + "\n")


def table(measures: Sequence[Measure]) -> str:
    """The measures as aligned text."""
    width = max(len(measure.name) for measure in measures)
    lines = []
    for m in measures:
        gate = (
            "" if m.at_least is None else f"  >= {m.at_least:g}  {'ok' if m.passed else 'FAILED'}"
        )
        lines.append(f"  {m.name:<{width}}  {m.value:8.3f}{gate}")
    return "\n".join(lines)
