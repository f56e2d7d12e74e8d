"""Characters become words: shared pixels are given to one of them, scores are put together."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt

from gesso_core.annotate.masks import Mask

# n characters   H, W crop of the picture

LEAST_GLYPH = 0.3  # a mask without a fitting glyph is still worth something


def share_out(masks_nHW: Sequence[Mask], glyphs_nHW: Sequence[Mask]) -> list[Mask]:
    """Disjoint masks: a pixel that several claim goes to the one whose glyph is nearest."""
    claimed_nHW = np.stack(masks_nHW)
    contested_HW = claimed_nHW.sum(0) > 1
    if not contested_HW.any():
        return list(masks_nHW)
    owner_HW = claimed_nHW.argmax(0)  # without any glyph the first claimant keeps the pixel
    nearest_HW = np.full(contested_HW.shape, np.inf)
    for number, (mask_HW, glyph_HW) in enumerate(zip(masks_nHW, glyphs_nHW, strict=True)):
        disputed_HW = mask_HW & contested_HW
        if not disputed_HW.any() or not glyph_HW.any():
            continue
        away_HW = distance_transform_edt(~glyph_HW)
        nearer_HW = disputed_HW & (away_HW < nearest_HW)
        nearest_HW[nearer_HW], owner_HW[nearer_HW] = away_HW[nearer_HW], number
    return [
        mask_HW & (~contested_HW | (owner_HW == number)) for number, mask_HW in enumerate(masks_nHW)
    ]


def character_score(predicted_iou: float, stability: float, glyph_iou: float) -> float:
    """How far a mask can be trusted, 0..1."""
    sure = min(max(predicted_iou, 0.0), 1.0) * min(max(stability, 0.0), 1.0)
    return sure * max(glyph_iou, LEAST_GLYPH)
