"""The small HART, measured as the small Sana is.

The same prompts, references and scores. In addition, what the continuous residual is worth: PSNR of
the tokenizer with its codes alone and with the residual that they leave, on concepts that no
training saw; and retrieval of pictures drawn without residual.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from gesso_core.evaluate.references import References
from gesso_core.evaluate.retrieval import score
from gesso_core.evaluate.run import BATCH, PROMPT_SETS, SIZE, Measure
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.metrics import psnr
from gesso_core.models.dc_ae import DCAE
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.train.compose import COLORS, composite, palette_colors, shrink, sprites_to_float

HART_GATES = {
    "held-in top-1": 0.85,
    "held-in background": 0.95,
    "held-out top-1": 0.80,
    "held-out background": 0.95,
    "tokenizer: hybrid less discrete PSNR (dB)": 2.0,
}
WITHOUT_RESIDUAL = ("held-in", "held-out")  # prompt sets that are drawn from codes alone as well


def evaluate_hart(
    pipeline: HartPipeline, references: References, seed: int = 0, limit: int | None = None
) -> list[Measure]:
    """Scores of every prompt set; ``limit`` prompts of each where given."""
    autoencoder = load_dc_ae(resolve(pipeline.autoencoder))
    measures = tokenizer_measures(pipeline, autoencoder)
    for name, build in PROMPT_SETS.items():
        prompts = build(references)[:limit]
        texts = [prompt.text for prompt in prompts]
        started = time.process_time()
        pictures = draw_hart(pipeline, autoencoder, texts, seed)
        seconds = (time.process_time() - started) / len(prompts)
        scores = asdict(score(prompts, pictures, references))
        labels = {"top1": "top-1", "top5": "top-5", "styled": "top-1 and style"}
        for key in ("top1", "top5", "styled", "background"):
            measures.append(_measure(f"{name} {labels.get(key, key)}", scores[key]))
        measures.append(_measure(f"{name} CPU seconds per picture", seconds))
        if name in WITHOUT_RESIDUAL:
            plain = draw_hart(pipeline, autoencoder, texts, seed, residual=False)
            measures.append(
                _measure(f"{name} top-1, codes alone", score(prompts, plain, references).top1)
            )
    return measures


@torch.no_grad()
def tokenizer_measures(pipeline: HartPipeline, autoencoder: DCAE) -> list[Measure]:
    """PSNR of the held-out sprites from their codes alone, and with the residual left by them."""
    pixels = load_file(resolve(pipeline.autoencoder) / "held_out_sprites.safetensors")["pixels"]
    colors = palette_colors(torch.arange(len(pixels)) % len(COLORS))
    pictures = shrink(composite(sprites_to_float(pixels), colors), SIZE)
    quantizer, factor = pipeline.quantizer, pipeline.scaling_factor
    codes = quantizer.encode_hybrid(autoencoder.encode(pictures) * factor)
    sums = quantizer.partial_sums(codes.indices, phi_at_last=False)
    hybrid = sums[-2] + codes.rest_BNC.mT.reshape(sums[-2].shape)

    def quality(latent_BChw: Tensor) -> float:
        decoded = autoencoder.decode(latent_BChw / factor).clamp(-1, 1)
        return float(psnr(decoded, pictures).mean())

    discrete, whole = quality(sums[-1]), quality(hybrid)
    return [
        _measure("tokenizer: discrete PSNR (dB)", discrete),
        _measure("tokenizer: hybrid PSNR (dB)", whole),
        _measure("tokenizer: hybrid less discrete PSNR (dB)", whole - discrete),
    ]


@torch.no_grad()
def draw_hart(
    pipeline: HartPipeline,
    autoencoder: DCAE,
    texts: Sequence[str],
    seed: int,
    *,
    residual: bool = True,
) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1]; prompt number i is drawn with seed ``seed + i``."""
    pictures: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        drafts = []
        for i, text in enumerate(texts[start : start + BATCH], start=start):
            request = GenerationRequest(prompt=text, width=SIZE, height=SIZE, seed=seed + i)
            recipe = pipeline.recipe(request)
            options = replace(recipe.options, residual=residual)
            drafts.append(pipeline.begin(replace(recipe, options=options)))
        while not drafts[0].done:
            drafts = pipeline.advance(drafts)
        latents = torch.stack([pipeline.latent(draft) for draft in drafts])
        pictures.append(autoencoder.decode(latents).clamp(-1, 1))
    return torch.cat(pictures)


def _measure(name: str, value: float) -> Measure:
    return Measure(name=name, value=value, at_least=HART_GATES.get(name))
