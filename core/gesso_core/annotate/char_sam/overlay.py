"""Results to look at: characters in bright colours over a darkened picture."""

import numpy as np

from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.palette import colour_of
from gesso_core.pipelines.pictures import Pixels

DARKEN = 0.45
REFUSED = (120, 120, 120)


def overlay(picture_HW3: Pixels, result: PictureResult) -> Pixels:
    """The picture with every character's mask; refused ones are gray."""
    painted = picture_HW3.astype(np.float64) * DARKEN
    number = 0
    for word in result.words:
        for character in word.characters:
            paint = np.array(REFUSED if character.refused else colour_of(number, saturation=0.9))
            number += 1
            mask_HW = character.mask.paint(result.size)
            painted[mask_HW] = 0.25 * picture_HW3[mask_HW] + 0.75 * paint
    return painted.round().clip(0, 255).astype(np.uint8)
