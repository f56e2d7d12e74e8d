"""The stroke colour step, ours and not the paper's: masks end where the text's colour ends.

It is worth more than any prompt on plain print, and switches itself off where text and background
do not differ clearly: outlined, textured or strongly shaded letters.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from gesso_core.annotate.char_sam.ink import Lab
from gesso_core.annotate.masks import Mask

# H, W crop of the picture

KEPT = (0.6, 1.4)  # of the mask's area
SEPARATE = 2.0  # d' of text and background colours
SQUARE = np.ones((3, 3), dtype=bool)


def stroke_mask(mask_HW: Mask, glyph_HW: Mask, ink_HW: Mask) -> Mask | None:
    """The ink in and just around a mask and its glyph.

    The mask may have lost a stroke that the glyph knows of. None when the ink found is far from
    both in size: then it is another thing's colour.
    """
    found_HW: Mask = ink_HW & binary_dilation(mask_HW | glyph_HW, structure=SQUARE)
    area = np.count_nonzero(found_HW)
    sizes = [np.count_nonzero(mask_HW), np.count_nonzero(glyph_HW)]
    fits = any(KEPT[0] * size <= area <= KEPT[1] * size for size in sizes if size)
    return found_HW if fits and area else None


def separation(lab_HW3: Lab, text_HW: Mask, background_HW: Mask) -> float:
    """d' of two sets of pixels along the line between their mean colours (CIELAB).

    The distance of the means in units of the spread: 2 means that the clusters hardly overlap.
    """
    if not text_HW.any() or not background_HW.any():
        return 0.0
    text, background = lab_HW3[text_HW], lab_HW3[background_HW]
    line: NDArray[np.float32] = text.mean(0) - background.mean(0)
    length = float(np.linalg.norm(line))
    if length < 1e-6:
        return 0.0
    spread = ((text @ line).var() + (background @ line).var()) / 2
    return float(length**2 / max(np.sqrt(spread), 1e-6))
