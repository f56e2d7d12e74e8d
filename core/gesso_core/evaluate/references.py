"""References for concept retrieval: every trained sprite, reduced to 16 x 16 pixels.

Average pooling and compositing commute, so small premultiplied sprites laid on a flat color are
exactly the pooled features of the full pictures. Axes: N references, F = 16 x 16 x 3 features.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.train.compose import composite, palette_colors, shrink, sprites_to_float
from gesso_core.train.concepts import Concept
from gesso_core.train.sprites import SpriteSet

GRID = 16
TOO_CLOSE = 0.15  # mean color distance below which a sprite vanishes on its background


@dataclass(frozen=True, kw_only=True)
class References:
    """Pooled sprites with concept and style numbers."""

    sprites_N4HW: Tensor
    concept_of_N: Tensor
    style_of_N: Tensor
    concepts: tuple[Concept, ...]

    def on_color(self, color: int) -> Tensor:
        """Features (N, F) of every reference on one palette color."""
        colors = palette_colors(torch.full((len(self.sprites_N4HW),), color))
        return composite(self.sprites_N4HW, colors).flatten(1)

    def visible(self, color: int) -> Tensor:
        """(N,) bool: whether a reference stands out from the palette color."""
        alpha = self.sprites_N4HW[:, 3:].sum(dim=(2, 3)).clamp(min=1e-6)
        mean = self.sprites_N4HW[:, :3].sum(dim=(2, 3)) / alpha
        distance = torch.linalg.vector_norm(mean - palette_colors(torch.tensor([color])), dim=1)
        far: Tensor = distance >= TOO_CLOSE
        return far

    def find(self, concept: int, style: int) -> int | None:
        """Number of the reference of a concept in a style."""
        rows = ((self.concept_of_N == concept) & (self.style_of_N == style)).nonzero()
        return int(rows[0]) if len(rows) else None


def features(pictures_BCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1] as (B, F), pooled to 16 x 16."""
    return F.adaptive_avg_pool2d(pictures_BCHW.float(), GRID).flatten(1)


def save_references(sprites: SpriteSet, path: Path) -> None:
    """Write the pooled sprites and the words of their concepts."""
    pooled = shrink(sprites_to_float(sprites.pixels_NHW4), GRID)
    rows = [[c.emoji, c.name, list(c.keywords), c.reserved] for c in sprites.concepts]
    tensors = {
        "sprites": (pooled * 255).round().to(torch.uint8).contiguous(),
        "concept": sprites.concept_of_N.to(torch.int16),
        "style": sprites.style_of_N.to(torch.uint8),
    }
    save_file(tensors, path, metadata={"concepts": json.dumps(rows)})


def load_references(path: Path) -> References:
    """Read what ``save_references`` wrote."""
    with safe_open(path, framework="pt") as file:
        rows = json.loads(file.metadata()["concepts"])
        return References(
            sprites_N4HW=file.get_tensor("sprites").float() / 255,
            concept_of_N=file.get_tensor("concept").long(),
            style_of_N=file.get_tensor("style").long(),
            concepts=tuple(
                Concept(emoji=e, name=n, keywords=tuple(k), reserved=r) for e, n, k, r in rows
            ),
        )
