"""``python -m gesso_core.ptq.quality``: what quantization does to the pictures of the small Sana.

The same prompts and seeds are drawn by the model as it is, by quantized versions of it in the exact
arithmetic of their formats (mode ``reference``), and by one whose weights and inputs are plainly
rounded to INT4. Compared with the pictures of the model as it is: PSNR, SSIM and a perceptual
distance; by themselves: concept retrieval, as in `gesso_core.evaluate`.

The perceptual distance is built like LPIPS (arXiv 1801.03924) on a network that ships with gesso:
the features of every stage of the DC-AE encoder, scaled to unit length over the channels; the
squared difference, averaged over positions and then over stages. Its values are not those of LPIPS,
which has another network and learned weights of channels.
"""

# B pictures   C channels

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_core.errors import GessoError
from gesso_core.evaluate import prompts as fixed
from gesso_core.evaluate.prompts import EvaluationPrompt
from gesso_core.evaluate.references import References, load_references
from gesso_core.evaluate.retrieval import score
from gesso_core.evaluate.run import draw
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.metrics import psnr, ssim
from gesso_core.models.dc_ae import Encoder
from gesso_core.pipelines.load import load_denoiser, load_its_autoencoder
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.ptq.naive import round_plainly
from gesso_core.ptq.picture_grid import picture_grid
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.registry import MODELS

BASE: Final = "sana-tiny"
AS_IS: Final = "as it is"
NAIVE: Final = "naive W4A4"
SEED: Final = 0
GRID_PROMPTS: Final = (
    "a dog",
    "a red apple, 3D style, on a blue background",
    "a turtle, flat style, on a yellow background",
    "a castle",
    "an owl, 3D style, on a pink background",
    "a rocket",
    "a sunflower",
    "a penguin, 3D style, on a red background",
    "a hamburger, 3D style, on a yellow background",
    "a guitar",
)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Pictures of one version of the model; means over all of them.

    The first three compare with the pictures of the model as it is; None for those themselves.
    ``weight_bytes``: of the denoiser as stored.
    """

    psnr_db: float | None
    ssim: float | None
    perceptual: float | None
    top1: float
    top5: float
    background: float
    pictures: int
    weight_bytes: int


def perceptual_distance(encoder: Encoder, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """The distance described above, (B,); pictures in [-1, 1], sides multiples of the factor."""
    pairs = list(zip(_features(encoder, a_BCHW), _features(encoder, b_BCHW), strict=True))
    stages = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
    return torch.stack(stages).mean(dim=0)


def _features(encoder: Encoder, x_BCHW: Tensor) -> list[Tensor]:
    found = []
    with torch.inference_mode():
        x_BCHW = encoder.project_in(x_BCHW.clamp(-1, 1))
        for stage in encoder.stages:
            x_BCHW = stage(x_BCHW)
            found.append(F.normalize(x_BCHW, dim=1))
    return found


def evaluation_prompts(references: References, limit: int | None = None) -> list[EvaluationPrompt]:
    """Compositions that were trained and that were not; ``limit`` of each where given."""
    return [*fixed.held_in(references)[:limit], *fixed.held_out(references)[:limit]]


def versions(models: Sequence[str | Path]) -> dict[str, TextToImage]:
    """The model as it is, the quantized versions given, and the naive one; all in fp32."""
    autoencoder = load_its_autoencoder(BASE)
    exact = load_denoiser(BASE)
    found = {AS_IS: TextToImage(exact, autoencoder)}
    for model in models:
        quantized = load_denoiser(model, quantized_mode="reference")
        found[Path(model).name] = TextToImage(quantized, autoencoder)
    naive = load_denoiser(BASE)
    round_plainly(naive.model, weight="int4", activation="int4")
    found[NAIVE] = TextToImage(naive, autoencoder)
    return found


def compare(
    pipelines: Mapping[str, TextToImage], limit: int | None = None, seed: int = SEED
) -> dict[str, Quality]:
    """Draw the evaluation prompts with every version and measure the pictures."""
    references = load_references(resolve(BASE) / "references.safetensors")
    prompts = evaluation_prompts(references, limit)
    encoder = load_dc_ae(resolve(MODELS[BASE].autoencoder)).encoder
    exact: Tensor | None = None
    qualities = {}
    for name, pipeline in pipelines.items():
        pictures = draw(pipeline, [prompt.text for prompt in prompts], seed)
        scores = score(prompts, pictures, references)
        same = exact is None
        exact = pictures if exact is None else exact
        qualities[name] = Quality(
            psnr_db=None if same else float(psnr(pictures, exact).mean()),
            ssim=None if same else float(ssim(pictures, exact).mean()),
            perceptual=None
            if same
            else float(perceptual_distance(encoder, pictures, exact).mean()),
            top1=scores.top1,
            top5=scores.top5,
            background=scores.background,
            pictures=len(prompts),
            weight_bytes=_stored_bytes(pipeline),
        )
    return qualities


def table(qualities: Mapping[str, Quality]) -> str:
    """The numbers as a markdown table."""
    lines = [
        "| version | bytes | PSNR (dB) | SSIM | perceptual | top-1 | top-5 | background |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, q in qualities.items():
        compared = " | ".join(
            "" if value is None else f"{value:{form}}"
            for value, form in ((q.psnr_db, ".2f"), (q.ssim, ".4f"), (q.perceptual, ".4f"))
        )
        lines.append(
            f"| {name} | {q.weight_bytes:,} | {compared} | {q.top1:.3f} | {q.top5:.3f} | "
            f"{q.background:.3f} |"
        )
    return "\n".join(lines)


def _stored_bytes(pipeline: TextToImage) -> int:
    """What was stored in 16 bit is held in fp32 here."""
    model = pipeline.denoiser.model
    layers = [module for module in model.modules() if isinstance(module, SVDQuantLinear)]
    return 2 * sum(p.numel() for p in model.parameters()) + sum(
        layer.record_nbytes for layer in layers
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; write the grid of pictures and the numbers."""
    parser = argparse.ArgumentParser(prog="python -m gesso_core.ptq.quality", description=__doc__)
    shipped = [entry.name for entry in MODELS.values() if entry.base == BASE]
    parser.add_argument("--models", nargs="*", default=shipped, help="names or folders")
    parser.add_argument("--out", type=Path, default=Path("docs/images/quantized_grid.png"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--limit", type=int, help="only the first prompts of each set")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    models = [name if name in MODELS else Path(name) for name in options.models]
    try:
        pipelines = versions(models)
    except GessoError as error:
        parser.error(error.message)
    qualities = compare(pipelines, options.limit, options.seed)
    print(table(qualities))
    rows = {name: draw(p, GRID_PROMPTS, options.seed) for name, p in pipelines.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, GRID_PROMPTS).save(options.out, optimize=True)
    if options.json:
        content = {name: asdict(quality) for name, quality in qualities.items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
