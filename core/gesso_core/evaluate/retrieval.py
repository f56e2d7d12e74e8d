"""Concept retrieval: is the nearest reference of a drawn picture what the prompt asked for?

For a prompt (concept, style, color) every reference is laid on the color; the squared L2 distance
of 16 x 16 pooled pixels ranks them. Background: the median over the two outermost pixels, compared
with the palette.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gesso_core.evaluate.prompts import EvaluationPrompt
from gesso_core.evaluate.references import References, features
from gesso_core.train.captions import ANY_STYLE
from gesso_core.train.compose import PALETTE_K3

BORDER = 2
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of prompts answered."""

    top1: float  # nearest reference shows the concept
    top5: float  # one of the five nearest does
    styled: float  # nearest reference has concept and style (any style counts if none was asked)
    background: float  # nearest palette color is the one asked for
    prompts: int


def score(
    prompts: Sequence[EvaluationPrompt], pictures_BCHW: Tensor, references: References
) -> Scores:
    """Score pictures in [-1, 1], one per prompt."""
    drawn_BF = features(pictures_BCHW)
    on_color = {color: references.on_color(color) for color in {p.color for p in prompts}}
    top1 = top5 = styled = 0
    for prompt, drawn_F in zip(prompts, drawn_BF, strict=True):
        distance_N = (on_color[prompt.color] - drawn_F).square().sum(dim=1)
        nearest = distance_N.topk(TOP, largest=False).indices
        hits = [int(c) in prompt.concepts for c in references.concept_of_N[nearest]]
        style = int(references.style_of_N[nearest[0]])
        top1 += hits[0]
        top5 += any(hits)
        styled += hits[0] and prompt.style in (ANY_STYLE, style)
    wanted = torch.tensor([prompt.color for prompt in prompts])
    correct = background_colors(pictures_BCHW) == wanted
    count = len(prompts)
    return Scores(
        top1=top1 / count,
        top5=top5 / count,
        styled=styled / count,
        background=float(correct.float().mean()),
        prompts=count,
    )


def background_colors(pictures_BCHW: Tensor) -> Tensor:
    """Nearest palette color (B,) of the median border pixel."""
    inside = torch.zeros(pictures_BCHW.shape[-2:], dtype=torch.bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    border_BCP = pictures_BCHW.float()[:, :, ~inside]
    median_BC = (border_BCP.median(dim=2).values + 1) / 2
    return torch.cdist(median_BC, PALETTE_K3).argmin(dim=1)
