"""Latents of every sprite on every palette color, encoded once by the frozen autoencoder.

Axes: N sprites, K palette colors, V views, C latent channels, h and w latent height and width.
View 0 is the sprite as it is; the others are slightly scaled, shifted or mirrored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from gesso_core.models.dc_ae import DCAE
from gesso_core.train.captions import held_out_color
from gesso_core.train.compose import (
    COLORS,
    augment,
    composite,
    palette_colors,
    shrink,
    sprites_to_float,
)
from gesso_core.train.sprites import STYLES, SpriteSet

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class LatentViews:
    """Cached latents, divided by their common std."""

    latents_NKVChw: Tensor  # float16
    std: float

    @property
    def views(self) -> int:
        """Views per (sprite, color)."""
        return self.latents_NKVChw.shape[2]

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": self.latents_NKVChw, "std": torch.tensor(self.std)}, path)

    @classmethod
    def load(cls, path: Path) -> "LatentViews":
        """Read what ``save`` wrote."""
        tensors = load_file(path)
        return cls(latents_NKVChw=tensors["latents"], std=float(tensors["std"]))


@torch.no_grad()
def encode_views(
    model: DCAE,
    sprites: SpriteSet,
    *,
    size: int,
    views: int,
    std: float | None = None,
    seed: int = 7,
) -> LatentViews:
    """Encode every allowed (sprite, color); held-out compositions stay zero.

    Args:
        model: the autoencoder; only its encoder is used.
        sprites: sprites of the denoiser's concepts.
        size: side of the pictures in pixels.
        views: views per (sprite, color).
        std: divide by this instead of the std of the latents themselves.
        seed: of the augmentation.
    """
    device = next(model.parameters()).device
    generator = Generator().manual_seed(seed)
    shown = shown_compositions(sprites)
    jobs = [(n, k, v) for n, k in shown.nonzero().tolist() for v in range(views)]
    latents: Tensor | None = None
    for chunk in _chunks(jobs):
        n, k, v = torch.tensor(chunk).unbind(dim=1)
        stored = sprites_to_float(sprites.pixels_NHW4[n])
        pictures = _pictures(stored, k, v > 0, generator, size).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            z = model.encode(pictures).float().cpu()
        if latents is None:
            shape = (len(shown), len(COLORS), views, *z.shape[1:])
            latents = torch.zeros(shape, dtype=torch.float32)
        latents[n, k, v] = z
    assert latents is not None
    divisor = float(latents[shown].std()) if std is None else std
    return LatentViews(latents_NKVChw=(latents / divisor).half(), std=divisor)


def shown_compositions(sprites: SpriteSet) -> Tensor:
    """(N, K) bool: whether a sprite is ever shown on a color."""
    shown = torch.ones(len(sprites.concept_of_N), len(COLORS), dtype=torch.bool)
    pairs = zip(sprites.concept_of_N.tolist(), sprites.style_of_N.tolist(), strict=True)
    for n, (concept, style) in enumerate(pairs):
        shown[n, held_out_color(sprites.concepts[concept].emoji, STYLES[style])] = False
    return shown


def _chunks(jobs: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    for start in range(0, len(jobs), CHUNK):
        yield jobs[start : start + CHUNK]


def _pictures(stored: Tensor, k: Tensor, moved: Tensor, generator: Generator, size: int) -> Tensor:
    views, colors = shrink(stored, size), palette_colors(k)
    if bool(moved.any()):
        changed = augment(
            stored[moved], generator, scale=(0.85, 1.0), shift=0.05, flip=0.15, untouched=0.0
        )
        views[moved] = shrink(changed, size)
        colors[moved] = palette_colors(k[moved], generator)
    return composite(views, colors).contiguous(memory_format=torch.channels_last)
