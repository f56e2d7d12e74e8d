"""How good a trained vision tower is: reconstruction, use of its tables, and what features tell.

Axes: N pictures, S side, h and w code grid, D depth, C feature channels, V table rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_core.metrics import psnr, ssim
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.train.autoencoder import reference_pictures
from gesso_core.train.captioned_pictures import CaptionedPictures
from gesso_core.train.compose import COLORS
from gesso_core.train.sprites import SpriteSet

CHUNK = 64
RIDGE = 1e-3  # of the mean diagonal, for the linear probes


@dataclass(frozen=True)
class Seen:
    """Pictures after the tower, with what they show."""

    features_NhwC: Tensor
    pooled_NC: Tensor
    concept_N: Tensor
    style_N: Tensor
    color_N: Tensor


def tower_quality(
    tower: VisionTower, data: CaptionedPictures, unseen: SpriteSet
) -> dict[str, dict[str, float]]:
    """All measures.

    Args:
        tower: on the CPU.
        data: what it was trained on; measured on the compositions held out.
        unseen: sprites of concepts that it never saw; there may be none.
    """
    held_out_N3SS = data.compositions(*data.held_out())
    with torch.no_grad():
        codes = torch.cat([tower.encode(x).codes_BhwD for x in torch.split(held_out_N3SS, CHUNK)])
    measures = {"held-out compositions": reconstruction_quality(tower, held_out_N3SS)}
    if len(unseen.pixels_NHW4):
        pictures = reference_pictures(unseen, tower.config.image_size)
        measures["unseen concepts"] = reconstruction_quality(tower, pictures)
    return {
        **measures,
        "codebook": codebook_use(codes, tower.quantizer.tables[0].entries),
        "recognition of held-out compositions": recognition(tower, data),
    }


@torch.no_grad()
def reconstruction_quality(tower: VisionTower, pixels_N3SS: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of decoded pictures, with the quantizer and without it."""
    with_codes, without = [], []
    for part in torch.split(pixels_N3SS, CHUNK):
        with_codes.append(tower.decode(tower.encode(part).features_BhwC))
        features = tower.quantizer.to_code_shape(tower.features(part))
        without.append(tower.decode(features))
    return {
        "psnr_db": float(psnr(torch.cat(with_codes), pixels_N3SS).mean()),
        "ssim": float(ssim(torch.cat(with_codes), pixels_N3SS).mean()),
        "psnr_db_without_quantizer": float(psnr(torch.cat(without), pixels_N3SS).mean()),
        "pictures": float(len(pixels_N3SS)),
    }


def codebook_use(codes_NhwD: Tensor, entries: int) -> dict[str, float]:
    """Share of table rows that pictures use, at any depth and at the first; perplexity of both."""
    shares = {}
    for name, codes in (("any depth", codes_NhwD), ("first depth", codes_NhwD[..., 0])):
        counts_V = torch.bincount(codes.flatten(), minlength=entries).float()
        share_V = counts_V / counts_V.sum()
        entropy = -(share_V * share_V.clamp(min=1e-12).log()).sum()
        shares[f"used, {name}"] = float((counts_V > 0).float().mean())
        shares[f"perplexity, {name}"] = float(entropy.exp())
    return shares


def recognition(tower: VisionTower, data: CaptionedPictures) -> dict[str, float]:
    """Accuracy on held-out compositions of what is read off quantized features.

    Concept: of the nearest shown picture by cosine, of the pooled vectors and of the flat features.
    Concept, style and color: linear probes on the flat features, fitted on every sprite on three
    colors that it is shown on.
    """
    sprites = torch.arange(len(data.shown_NK)).repeat_interleave(3)
    colors = (torch.arange(len(sprites)) * 5) % len(COLORS)
    shown = data.shown_NK[sprites, colors]
    known = _seen(tower, data, sprites[shown], colors[shown])
    asked = _seen(tower, data, *data.held_out())
    probes = _probes(known, asked)
    return {
        "concept, pooled": _nearest(known, asked, known.pooled_NC, asked.pooled_NC),
        "concept, features": _nearest(known, asked, _flat(known), _flat(asked)),
        **{f"{what}, probe": accuracy for what, accuracy in probes.items()},
        "pictures": float(len(asked.concept_N)),
    }


def held_out_concepts(sprites: SpriteSet, seen: SpriteSet) -> SpriteSet:
    """Sprites of concepts that the tower never saw, in the styles that it saw."""
    names = {concept.name for concept in seen.concepts}
    styles = int(seen.style_of_N.max()) + 1
    return sprites.of_styles(styles).subset(lambda c: c.held_out and c.name not in names)


@torch.no_grad()
def _seen(tower: VisionTower, data: CaptionedPictures, sprite_N: Tensor, color_N: Tensor) -> Seen:
    features, pooled = [], []
    for rows in torch.split(torch.arange(len(sprite_N)), CHUNK):
        codes = tower.encode(data.compositions(sprite_N[rows], color_N[rows]))
        features.append(codes.features_BhwC)
        pooled.append(tower.pooled(codes.features_BhwC))
    return Seen(
        torch.cat(features),
        torch.cat(pooled),
        data.concept_of_N[sprite_N],
        data.style_of_N[sprite_N],
        color_N,
    )


def _flat(seen: Seen) -> Tensor:
    return seen.features_NhwC.flatten(1)


def _nearest(known: Seen, asked: Seen, known_NC: Tensor, asked_NC: Tensor) -> float:
    mean_C = known_NC.mean(dim=0)
    cosine = F.normalize(asked_NC - mean_C, dim=1) @ F.normalize(known_NC - mean_C, dim=1).T
    return float((known.concept_N[cosine.argmax(dim=1)] == asked.concept_N).float().mean())


def _probes(known: Seen, asked: Seen) -> dict[str, float]:
    """Accuracy of one ridge regression from flat features to the one-hot labels of each kind."""
    x_NC, asked_NC = (F.pad(_flat(seen), (0, 1), value=1.0).double() for seen in (known, asked))
    squares_CC = x_NC.T @ x_NC
    squares_CC += RIDGE * squares_CC.diagonal().mean() * torch.eye(len(squares_CC)).double()
    kinds = {
        "concept": (known.concept_N, asked.concept_N),
        "style": (known.style_N, asked.style_N),
        "color": (known.color_N, asked.color_N),
    }
    labels = {what: torch.unique(pair[0], return_inverse=True) for what, pair in kinds.items()}
    targets = [F.one_hot(place_N).double() for _, place_N in labels.values()]
    answers = asked_NC @ torch.linalg.solve(squares_CC, x_NC.T @ torch.cat(targets, dim=1))
    parts = torch.split(answers, [target.shape[1] for target in targets], dim=1)
    return {
        what: float((labels[what][0][part.argmax(dim=1)] == kinds[what][1]).float().mean())
        for what, part in zip(kinds, parts, strict=True)
    }
