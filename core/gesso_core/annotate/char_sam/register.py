"""Fit a glyph's picture to what is seen: the step that makes inaccurate boxes harmless.

The template starts stretched over the character's box; then its four edges move, one at a time and
in ever smaller steps, as long as its IoU with the seen ink grows. The best font wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gesso_core.annotate.char_sam.glyphs import Template
from gesso_core.annotate.geometry import Box
from gesso_core.annotate.masks import Mask

# h, w the flat word

STEPS = (0.15, 0.08, 0.04)  # of the box
REACH = 0.4  # an edge stays this near to where it began, of the box
SMALLEST = 0.4  # of the box's size
ROUNDS = 4
FINEST = 72  # the fit is made at about this many pixels along the longer side


@dataclass(frozen=True, kw_only=True, eq=False)
class Registration:
    """A template where it fits best: ``edges`` (u0, v0, u1, v1) of the flat word."""

    template: Template
    edges: Box
    iou: float

    def paint(self, size: tuple[int, int]) -> Mask:
        """The glyph's ink in the flat word, (h, w)."""
        painted_hw = np.zeros(size, dtype=bool)
        placed = _place(self.template.ink_hw, self.edges, size)
        if placed is not None:
            rows, columns, ink_hw = placed
            painted_hw[rows, columns] = ink_hw
        return painted_hw


def register(templates: Sequence[Template], target_hw: Mask, edges: Box) -> Registration | None:
    """The best font at its best place; None without templates or without a target pixel.

    Args:
        target_hw: the ink that the character's own box was segmented to.
        edges: the character's box (u0, v0, u1, v1).
    """
    window_hw, origin, step = _window(target_hw, edges)
    if not templates or not window_hw.any():
        return None
    local = _moved(edges, origin, 1 / step)
    fits = [(*_descend(template.ink_hw, window_hw, local), template) for template in templates]
    iou, found, template = max(fits, key=lambda fit: fit[0])
    u0, v0, u1, v1 = (edge * step for edge in found)
    x, y = origin
    return Registration(template=template, edges=(u0 + x, v0 + y, u1 + x, v1 + y), iou=iou)


def unregistered(templates: Sequence[Template], target_hw: Mask, edges: Box) -> Registration | None:
    """The best font stretched over the box as it is: for comparison."""
    fits = [(_iou(t.ink_hw, target_hw, edges), t) for t in templates]
    if not fits or not target_hw.any():
        return None
    iou, template = max(fits, key=lambda fit: fit[0])
    return Registration(template=template, edges=edges, iou=iou)


def _descend(ink_hw: Mask, window_hw: Mask, start: Box) -> tuple[float, Box]:
    """Coordinate descent over the edges; deterministic, first improvement of each edge's best."""
    sides = (start[2] - start[0], start[3] - start[1])
    best, edges = _iou(ink_hw, window_hw, start), start
    for share in STEPS:
        for _ in range(ROUNDS):
            before = best
            for place in range(4):
                for sign in (-1, 1):
                    tried = _with_edge(edges, place, sign * share * sides[place % 2])
                    if not _allowed(tried, start, sides):
                        continue
                    iou = _iou(ink_hw, window_hw, tried)
                    if iou > best:
                        best, edges = iou, tried
            if best == before:
                break
    return best, edges


def _with_edge(edges: Box, place: int, change: float) -> Box:
    moved = list(edges)
    moved[place] += change
    return moved[0], moved[1], moved[2], moved[3]


def _allowed(edges: Box, start: Box, sides: tuple[float, float]) -> bool:
    near = all(abs(edges[i] - start[i]) <= REACH * sides[i % 2] + 1e-9 for i in range(4))
    return near and all(edges[i + 2] - edges[i] >= SMALLEST * sides[i] for i in range(2))


def _iou(ink_hw: Mask, window_hw: Mask, edges: Box) -> float:
    placed = _place(ink_hw, edges, (window_hw.shape[0], window_hw.shape[1]))
    if placed is None:
        return 0.0
    rows, columns, glyph_hw = placed
    both = int(np.count_nonzero(glyph_hw & window_hw[rows, columns]))
    either = int(np.count_nonzero(glyph_hw)) + int(np.count_nonzero(window_hw)) - both
    return both / max(either, 1)


def _place(ink_hw: Mask, edges: Box, size: tuple[int, int]) -> tuple[slice, slice, Mask] | None:
    """(Rows, columns, ink there) of the template stretched between the edges."""
    slices, indices = [], []
    for low, high, length, count in (
        (edges[1], edges[3], ink_hw.shape[0], size[0]),
        (edges[0], edges[2], ink_hw.shape[1], size[1]),
    ):
        first, last = max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), count)
        if last <= first or high <= low:
            return None
        share = (np.arange(first, last) + 0.5 - low) / (high - low)
        slices.append(slice(first, last))
        indices.append(np.clip((share * length).astype(int), 0, length - 1))
    return slices[0], slices[1], ink_hw[np.ix_(indices[0], indices[1])]


def _window(target_hw: Mask, edges: Box) -> tuple[Mask, tuple[int, int], int]:
    """The target around the box as far as edges may move, thinned out when it is large."""
    u0, v0, u1, v1 = edges
    width, height = REACH * (u1 - u0) + 1, REACH * (v1 - v0) + 1
    x0, y0 = max(int(u0 - width), 0), max(int(v0 - height), 0)
    x1, y1 = int(np.ceil(u1 + width)), int(np.ceil(v1 + height))
    step = max(1, round(max(u1 - u0, v1 - v0) / FINEST))
    return target_hw[y0:y1:step, x0:x1:step], (x0, y0), step


def _moved(edges: Box, origin: tuple[int, int], scale: float) -> Box:
    (u0, v0, u1, v1), (x, y) = edges, origin
    return (u0 - x) * scale, (v0 - y) * scale, (u1 - x) * scale, (v1 - y) * scale
