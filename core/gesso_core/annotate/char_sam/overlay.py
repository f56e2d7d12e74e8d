"""Results to look at: characters in bright colours over a darkened picture."""

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.palette import colour_of
from gesso_core.pipelines.pictures import Pixels

DARKEN = 0.45
REFUSED = (120, 120, 120)


def overlay(picture_HW3: Pixels, result: PictureResult) -> Pixels:
    """The picture with every character's mask; refused ones are gray."""
    painted = _rounded(np.arange(256) * DARKEN)[picture_HW3]
    number = 0
    for word in result.words:
        for character in word.characters:
            paint = np.array(REFUSED if character.refused else colour_of(number, saturation=0.9))
            number += 1
            place, window_hw = character.mask.place, character.mask.window_hw
            seen_N3 = picture_HW3[place][window_hw]
            painted[place][window_hw] = _rounded(0.25 * seen_N3 + 0.75 * paint)
    return painted


def _rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return values.round().clip(0, 255).astype(np.uint8)
