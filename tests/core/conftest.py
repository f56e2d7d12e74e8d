"""Fixtures of the core tests: a handful of made-up sprites."""

import pytest
import torch
from gesso_core.train.concepts import Concept
from gesso_core.train.sprites import SpriteSet

NAMES = ("disc", "square", "bar", "column", "frame", "corner")
INK = (
    (0.9, 0.1, 0.1),
    (0.1, 0.8, 0.2),
    (0.1, 0.2, 0.9),
    (0.9, 0.8, 0.1),
    (0.6, 0.1, 0.8),
    (0, 0.6, 0.6),
)


def shape(index: int, side: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = (row / side - 0.5).abs(), (column / side - 0.5).abs()
    masks = (
        x**2 + y**2 < 0.12,
        (x < 0.3) & (y < 0.3),
        y < 0.12,
        x < 0.12,
        (torch.maximum(x, y) < 0.4) & (torch.maximum(x, y) > 0.25),
        (row < side / 2) & (column < side / 2),
    )
    return masks[index].float()


@pytest.fixture
def sprite_set() -> SpriteSet:
    """Six shapes in two styles (dark and light ink) at 128 px."""
    pixels, concept_of, style_of = [], [], []
    for index, ink in enumerate(INK):
        for style, strength in enumerate((1.0, 0.6)):
            alpha = shape(index, 128)[..., None]
            color = torch.tensor(ink) * strength
            pixels.append((torch.cat([color * alpha, alpha], dim=-1) * 255).to(torch.uint8))
            concept_of.append(index)
            style_of.append(style)
    concepts = tuple(
        Concept(
            emoji=chr(0x1F600 + i), name=name, keywords=(f"{name}-like", "shape"), reserved=None
        )
        for i, name in enumerate(NAMES)
    )
    return SpriteSet(
        pixels_NHW4=torch.stack(pixels),
        concept_of_N=torch.tensor(concept_of),
        style_of_N=torch.tensor(style_of),
        concepts=concepts,
    )
