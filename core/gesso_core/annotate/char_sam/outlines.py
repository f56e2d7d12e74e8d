"""Masks as polygons, for formats that know nothing else.

The outline runs halfway between pixels, so that exactly the mask's pixel centres lie inside it.
Parts and holes are strung on one line by bridges walked there and back: by the even-odd rule they
enclose nothing.
"""

import numpy as np
from skimage.measure import approximate_polygon, find_contours

from gesso_core.annotate.char_sam.words import PlacedMask, signed_area
from gesso_core.annotate.geometry import Floats, Point


def outlines(mask: PlacedMask, *, tolerance: float = 0.0) -> list[list[Point]]:
    """Closed loops (x, y) in picture pixels around the parts and holes of a mask, largest first.

    Args:
        tolerance: pixels the outline may deviate, to save points.
    """
    padded = np.pad(mask.window_hw, 1).astype(float)
    loops = []
    for contour in find_contours(padded, 0.5):
        kept: Floats = approximate_polygon(contour, tolerance=tolerance)[:-1]
        if len(kept) >= 3:
            # Index i of the padded window is the centre of pixel i - 1, at i - 0.5.
            loops.append([(mask.x + x - 0.5, mask.y + y - 0.5) for y, x in kept.tolist()])
    return sorted(loops, key=lambda loop: abs(signed_area(loop)), reverse=True)


def single_outline(mask: PlacedMask, *, tolerance: float = 0.0) -> list[Point]:
    """All loops as one polygon; empty for an empty mask."""
    loops = outlines(mask, tolerance=tolerance)
    if not loops:
        return []
    line = [*loops[0], loops[0][0]] if len(loops) > 1 else list(loops[0])
    for loop in loops[1:]:
        line += [*loop, loop[0], loops[0][0]]
    return line
