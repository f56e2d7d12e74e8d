"""CGR, Character Glyph Refinement: the glyph tells the segmenter where ink is and where it is not.

Positive points lie deep in the registered glyph, negative ones in its counters first (there a box
alone over-segments), then between its strokes and the edges of its box.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label

from gesso_core.annotate.masks import Mask, box_of_mask
from gesso_core.annotate.segmenter.contract import BACKGROUND, OBJECT, Prompt

# H, W crop of the picture

POSITIVES, NEGATIVES = 3, 3
APART = 0.28  # of the longer side of the glyph's box
DEPTH = 0.06  # of the longer side
DEEP = 1.5  # pixels, for small characters
AREA_RATIO = (0.4, 2.5)  # of the mask to the glyph
WORSE = 0.15  # predicted IoU the glyph's mask may lose against the box's


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mask with the segmenter's opinion of it."""

    mask_HW: Mask
    predicted_iou: float
    stability: float


def glyph_prompt(
    glyph_HW: Mask, region_HW: Mask, *, positives: int = POSITIVES, negatives: int = NEGATIVES
) -> Prompt:
    """Box and points of a registered glyph.

    Args:
        region_HW: the glyph's own frame, which is not upright where the word is not.
    """
    x0, y0, x1, y1 = box_of_mask(glyph_HW)
    longer = max(x1 - x0, y1 - y0)
    inside = deepest(glyph_HW, positives, apart=APART * longer, depth=0.0)
    empty_HW = region_HW & ~glyph_HW
    counters_HW = counters(glyph_HW)
    depth = max(DEPTH * longer, DEEP)
    outside = deepest(counters_HW, negatives, apart=APART * longer, depth=min(depth, DEEP))
    outside += deepest(
        empty_HW, negatives - len(outside), apart=APART * longer, depth=depth, beside=outside
    )
    return Prompt(
        box=(float(x0), float(y0), float(x1), float(y1)),
        points=tuple((x + 0.5, y + 0.5) for x, y in inside + outside),
        labels=(OBJECT,) * len(inside) + (BACKGROUND,) * len(outside),
    )


def deepest(
    mask_HW: Mask,
    count: int,
    *,
    apart: float,
    depth: float,
    beside: list[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """Up to ``count`` pixels (x, y) farthest from the mask's edge, at least ``apart`` apart.

    Args:
        depth: pixels nearer to the edge than this do not count.
        beside: pixels already taken; new ones keep away from them too.
    """
    x0, y0, x1, y1 = box_of_mask(mask_HW)
    if count <= 0 or x1 <= x0:
        return []
    inner: NDArray[np.float64] = distance_transform_edt(np.pad(mask_HW[y0:y1, x0:x1], 1))
    rows, columns = np.mgrid[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1]
    for x, y in beside or []:
        inner[np.hypot(columns - x, rows - y) < apart] = 0
    found: list[tuple[int, int]] = []
    while len(found) < count:
        row, column = np.unravel_index(int(inner.argmax()), inner.shape)
        if inner[row, column] <= 0 or inner[row, column] < depth:
            break
        x, y = int(columns[row, column]), int(rows[row, column])
        found.append((x, y))
        inner[np.hypot(columns - x, rows - y) < max(apart, 1)] = 0
    return found


def counters(glyph_HW: Mask) -> Mask:
    """The holes of a glyph: background that the outside cannot reach."""
    labels_HW, _ = label(~np.pad(glyph_HW, 1))
    holes_HW: Mask = ((labels_HW != labels_HW[0, 0]) & (labels_HW > 0))[1:-1, 1:-1]
    return holes_HW


def choose(box: Candidate, glyph: Candidate, glyph_area: int) -> Candidate:
    """The glyph's mask, unless its size contradicts the glyph or the segmenter trusts it less."""
    ratio = np.count_nonzero(glyph.mask_HW) / max(glyph_area, 1)
    fits = AREA_RATIO[0] <= ratio <= AREA_RATIO[1]
    return glyph if fits and glyph.predicted_iou >= box.predicted_iou - WORSE else box
