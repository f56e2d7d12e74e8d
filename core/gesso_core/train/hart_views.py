"""Latents for training HART: many views of every sprite, no two with quite the same codes.

A transformer over codes would learn a finite set of code sequences by heart, whole picture by whole
picture, and then cannot put a known thing on another known color. So a picture is encoded with
several background colors around that of the palette, and its latent is quantized anew every time
with a little noise, and with wrong codes that the later scales have to make up for.

Axes: N sprites, K palette colors, V views, B batch, C latent channels, h and w latent sides.
"""

from pathlib import Path

import torch
from torch import Generator, Tensor

from gesso_core.models.dc_ae import DCAE
from gesso_core.models.hart.losses import TrainingTargets
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.train.compose import (
    augment,
    composite,
    palette_colors,
    shrink,
    sprites_to_float,
)
from gesso_core.train.latents import LatentViews, shown_compositions
from gesso_core.train.sprites import SpriteSet

VIEWS = 6  # the picture itself, then four on other shades of its color, then one that is moved too
MOVED_FROM = 5
CHUNK = 64
SEED = 8
MOST_NOISE = 0.08  # std of the noise on a latent of std 1
MOST_WRONG = 0.2  # share of wrong codes
NEARBY = 0.6  # std of the noise that leads to a plausible wrong code


def cached_views(
    path: Path, encoder: DCAE, sprites: SpriteSet, size: int, std: float
) -> LatentViews:
    """The views in the file, which is made on the first call."""
    if not path.exists():
        encode_shades(encoder, sprites, size=size, std=std).save(path)
    return LatentViews.load(path)


@torch.no_grad()
def encode_shades(model: DCAE, sprites: SpriteSet, *, size: int, std: float) -> LatentViews:
    """Encode all views of every composition that is shown; the others stay zero."""
    generator = Generator().manual_seed(SEED)
    shown = shown_compositions(sprites)
    jobs = [(n, k, v) for n, k in shown.nonzero().tolist() for v in range(VIEWS)]
    latents: Tensor | None = None
    for start in range(0, len(jobs), CHUNK):
        n, k, v = torch.tensor(jobs[start : start + CHUNK]).unbind(dim=1)
        pictures = _pictures(sprites_to_float(sprites.pixels_NHW4[n]), k, v, generator, size)
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(pictures).float()
        if latents is None:
            latents = torch.zeros((*shown.shape, VIEWS, *z.shape[1:]), dtype=torch.float16)
        latents[n, k, v] = (z / std).half()
    assert latents is not None
    return LatentViews(latents_NKVChw=latents, std=std)


def _pictures(stored: Tensor, k: Tensor, v: Tensor, generator: Generator, size: int) -> Tensor:
    moved = v >= MOVED_FROM
    views = shrink(stored, size)
    if bool(moved.any()):
        changed = augment(
            stored[moved], generator, scale=(0.85, 1.0), shift=0.05, flip=0.15, untouched=0.0
        )
        views[moved] = shrink(changed, size)
    shades = palette_colors(k, generator)
    colors = torch.where((v == 0)[:, None], palette_colors(k), shades)
    return composite(views, colors).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def noisy_targets(
    quantizer: MultiScaleQuantizer, latent_BChw: Tensor, generator: Generator
) -> TrainingTargets:
    """Codes of a batch with noise, and with wrong codes in what the transformer is fed.

    A wrong code is plausible (the nearest one of a disturbed latent) or that of another sample. The
    next scales code what is left after it, so that the transformer learns to correct itself.
    """
    batch, last = len(latent_BChw), len(quantizer.scales) - 1
    share_B = torch.rand(batch, generator=generator) * MOST_WRONG
    noise = torch.randn(latent_BChw.shape, generator=generator)
    strength_B = torch.rand(batch, generator=generator) * MOST_NOISE
    goal = latent_BChw + noise * strength_B[:, None, None, None]
    total = torch.zeros_like(goal)
    indices, teacher = [], []
    for scale in range(last + 1):
        wanted_BNC = quantizer.next_input(goal - total, scale)
        right_BN = _nearest(quantizer, wanted_BNC)
        indices.append(right_BN)
        if scale == last:
            break
        fed_BN = _with_errors(quantizer, wanted_BNC, right_BN, share_B, generator)
        total = total + quantizer.contribution(scale, quantizer.embed(fed_BN))
        teacher.append(quantizer.next_input(total, scale + 1))
    # The residual is that of the picture itself: the noise only varies the codes.
    left_BNC = (latent_BChw - total).flatten(2).mT
    return TrainingTargets(indices, torch.cat(teacher, dim=1), left_BNC)


def _with_errors(
    quantizer: MultiScaleQuantizer,
    wanted_BNC: Tensor,
    right_BN: Tensor,
    share_B: Tensor,
    generator: Generator,
) -> Tensor:
    disturbed = wanted_BNC + NEARBY * wanted_BNC.std() * torch.randn(
        wanted_BNC.shape, generator=generator
    )
    plausible_BN = _nearest(quantizer, disturbed)
    foreign_BN = right_BN[torch.randperm(len(right_BN), generator=generator)]
    chance = torch.rand(right_BN.shape, generator=generator)
    wrong_BN = torch.where(chance < 0.25 * share_B[:, None], foreign_BN, plausible_BN)
    return torch.where(chance < share_B[:, None], wrong_BN, right_BN)


def _nearest(quantizer: MultiScaleQuantizer, rows_BNC: Tensor) -> Tensor:
    return quantizer.nearest(rows_BNC.flatten(0, 1)).view(rows_BNC.shape[:2])
