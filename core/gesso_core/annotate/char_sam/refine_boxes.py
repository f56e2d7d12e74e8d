"""CBR, Character Box Refinement: one box per character from a word laid out flat (paper section 3).

The paper splits regions by a watershed on the segmenter's logits. Here the cuts are the cheapest
columns (`cuts`), and each segment is tightened to its ink.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from gesso_core.annotate.char_sam.cuts import cut_word
from gesso_core.annotate.char_sam.glyphs import FontSet
from gesso_core.annotate.char_sam.graphemes import visual_order
from gesso_core.annotate.char_sam.rectify import Rectangle
from gesso_core.annotate.char_sam.words import Flag, hull_of
from gesso_core.annotate.geometry import Box, Polygon
from gesso_core.annotate.masks import Mask, box_of_mask

# h, w the flat word   n characters, left to right

TOUCHING = 0.25  # ink in the cut column, of the word's ink height
CUT_WEIGHT = 1.0
VOTE_WEIGHT = 0.5  # price of a cut one expected width away from where the recogniser saw it
SPECK = 0.02  # components smaller than this share of the segment's ink do not stretch its box


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One character of a flat word.

    Attributes:
        cluster, index: the character and its place in the text.
        edges: (u0, v0, u1, v1) in the rectangle, tight around the ink.
        quad: the same as a quadrilateral in the picture, ``box`` its hull around the ink.
    """

    cluster: str
    index: int
    edges: Box
    quad: Polygon
    box: Box
    flags: tuple[Flag, ...]


def refine_boxes(
    rectangle: Rectangle,
    ink_hw: Mask,
    clusters: Sequence[str],
    fonts: FontSet,
    *,
    vote_n: NDArray[np.float64] | None = None,
) -> list[Segment]:
    """One segment per visible character, in visual order; spaces take width but give none.

    Args:
        ink_hw: the word's ink, laid out flat.
        clusters: the text's graphemes in logical order.
        vote_n: borders between the clusters in visual order (n + 1 columns), where a recogniser
            saw them.
    """
    order = visual_order(list(clusters))
    left, right = _extent(rectangle, ink_hw, len(order))
    widths = [1.0 if rectangle.downward else fonts.advance(clusters[index]) for index in order]
    heights_w = ink_hw.sum(0)
    tall = max(float(np.percentile(heights_w[left:right], 95)), 1.0)
    cost_w = CUT_WEIGHT * heights_w[left:right] / tall
    pull_nw = None if vote_n is None else _pull(vote_n - left, right - left)
    borders = [left + border for border in cut_word(cost_w, widths, pull_nw)]
    touching = [heights_w[border] / tall > TOUCHING for border in borders[1:-1]]
    segments = []
    for place, index in enumerate(order):
        if clusters[index].isspace():
            continue
        beside = touching[max(place - 1, 0) : place + 1] if place else touching[:1]
        segments.append(
            _segment(
                rectangle,
                ink_hw,
                (borders[place], borders[place + 1]),
                clusters[index],
                index,
                touching=any(beside),
            )
        )
    return segments


def even_boxes(rectangle: Rectangle, clusters: Sequence[str], fonts: FontSet) -> list[Segment]:
    """Boxes by advance widths alone, as high as the word: no look at the picture."""
    order = visual_order(list(clusters))
    widths = [1.0 if rectangle.downward else fonts.advance(clusters[index]) for index in order]
    columns = rectangle.size[1] - 2 * rectangle.margin
    borders = rectangle.margin + np.cumsum([0.0, *widths]) / sum(widths) * columns
    top, bottom = float(rectangle.margin), float(rectangle.size[0] - rectangle.margin)
    return [
        segment_of_edges(rectangle, clusters[index], index, (u0, top, u1, bottom))
        for index, (u0, u1) in zip(order, pairwise(borders.tolist()), strict=True)
        if not clusters[index].isspace()
    ]


def segment_of_edges(rectangle: Rectangle, cluster: str, index: int, edges: Box) -> Segment:
    """A segment between given edges of the flat word."""
    u0, v0, u1, v1 = edges
    quad = rectangle.to_picture(np.array([u0, u1, u1, u0]), np.array([v0, v0, v1, v1]))
    return Segment(
        cluster=cluster,
        index=index,
        edges=edges,
        quad=tuple((float(x), float(y)) for x, y in quad),
        box=hull_of(quad),
        flags=(),
    )


def _extent(rectangle: Rectangle, ink_hw: Mask, count: int) -> tuple[int, int]:
    """First and last column with ink; the whole word where there is hardly any."""
    x0, _, x1, _ = box_of_mask(ink_hw)
    if x1 - x0 >= max(2 * count, 0.3 * (ink_hw.shape[1] - 2 * rectangle.margin)):
        return x0, x1
    return rectangle.margin, ink_hw.shape[1] - rectangle.margin


def _pull(vote_n: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Price of each cut at each column: the distance from the recogniser's border, in widths."""
    width = columns / max(len(vote_n) - 1, 1)
    away = np.abs(np.arange(columns)[None] - vote_n[:, None]) / width
    return VOTE_WEIGHT * np.minimum(away, 2.0) ** 2


def _segment(
    rectangle: Rectangle,
    ink_hw: Mask,
    borders: tuple[int, int],
    cluster: str,
    index: int,
    *,
    touching: bool,
) -> Segment:
    own_hw = np.zeros_like(ink_hw)
    own_hw[:, borders[0] : borders[1]] = ink_hw[:, borders[0] : borders[1]]
    own_hw = _without_specks(own_hw)
    flags: list[Flag] = ["touching"] if touching else []
    if own_hw.sum() < 4:
        flags.append("low_ink")
        own_hw[rectangle.margin : -rectangle.margin, borders[0] : borders[1]] = True
    u0, v0, u1, v1 = (float(edge) for edge in box_of_mask(own_hw))
    quad = rectangle.to_picture(np.array([u0, u1, u1, u0]), np.array([v0, v0, v1, v1]))
    half = 0.5 / rectangle.scale
    x0, y0, x1, y1 = hull_of(rectangle.grid_hw2[own_hw])
    return Segment(
        cluster=cluster,
        index=index,
        edges=(u0, v0, u1, v1),
        quad=tuple((float(x), float(y)) for x, y in quad),
        box=(x0 - half, y0 - half, x1 + half, y1 + half),
        flags=tuple(flags),
    )


def _without_specks(ink_hw: Mask) -> Mask:
    """The ink without components too small to be even a dot."""
    labels_hw, count = label(ink_hw, structure=np.ones((3, 3)))
    if count < 2:
        return ink_hw
    sizes = np.bincount(labels_hw.ravel())
    sizes[0] = 0
    kept: Mask = (sizes >= SPECK * sizes.sum())[labels_hw] & ink_hw
    return kept
