"""A word larger than it need be is worked on at a smaller size, and its masks are grown back.

Every character has masks of the size of the word's crop, so that a word across a picture of 16
megapixels would take gigabytes. Little is lost by less: the segmenter sees 1024 pixels a side.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from gesso_core.annotate.char_sam.judge import SMALL, placed
from gesso_core.annotate.char_sam.words import (
    CharacterMask,
    Flag,
    PlacedMask,
    WordAnnotation,
    WordResult,
)
from gesso_core.annotate.geometry import Polygon
from gesso_core.annotate.masks import PixelBox
from gesso_core.annotate.segmenter.crops import window_around
from gesso_core.pipelines.pictures import Pixels

# H, W the picture   h, w a window of it

LARGEST: Final = 2048 * 2048  # pixels of a crop
MOST: Final = 32 * LARGEST  # pixels of a crop times characters, a byte each and several times over
# Of a pixel that is on. Where two neighbours share an edge their shares sum to this, and only one
# of them is above half of it, however the shares were rounded.
ON: Final = 254


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A word in a picture of its own, which is its crop made smaller.

    Attributes:
        picture_HW3, word: to be worked on.
        given: the word as it was.
        window: the crop (x0, y0, x1, y1) in the picture.
    """

    picture_HW3: Pixels
    word: WordAnnotation
    given: WordAnnotation
    window: PixelBox

    @property
    def pixel(self) -> tuple[float, float]:
        """Width and height of one of its pixels, in pixels of the picture."""
        x0, y0, x1, y1 = self.window
        height, width = self.picture_HW3.shape[:2]
        return (x1 - x0) / width, (y1 - y0) / height

    def grown(self, result: WordResult) -> WordResult:
        """A result about the smaller word, in the picture."""
        characters = tuple(self._character(character) for character in result.characters)
        large = all("small" not in character.flags for character in characters)
        return replace(
            result,
            annotation=self.given,
            characters=characters,
            mask=_union([character.mask for character in characters]),
            flags=_without_small(result.flags) if large else result.flags,
        )

    def _character(self, character: CharacterMask) -> CharacterMask:
        (x0, y0, *_), (across, down) = self.window, self.pixel
        left, top, right, bottom = character.box
        mask = self._mask(character.mask)
        large = mask.area and min(mask.window_hw.shape) >= SMALL
        return replace(
            character,
            box=(
                x0 + left * across, y0 + top * down, x0 + right * across, y0 + bottom * down
            ),
            quad=tuple((x0 + x * across, y0 + y * down) for x, y in character.quad),
            mask=mask,
            flags=_without_small(character.flags) if large else character.flags,
        )  # fmt: skip

    def _mask(self, mask: PlacedMask) -> PlacedMask:
        """The mask stretched bilinearly and cut at one half."""
        if not mask.area:
            return PlacedMask(self.window[0], self.window[1], np.zeros((0, 0), dtype=bool))
        padded = Image.fromarray(np.pad(mask.window_hw, 1).astype(np.uint8) * np.uint8(ON))
        x, y = mask.x - 1, mask.y - 1
        across, down = self.pixel
        width, height = self.window[2] - self.window[0], self.window[3] - self.window[1]
        left, top = max(math.ceil(x * across), 0), max(math.ceil(y * down), 0)
        right = min(math.floor((x + padded.width) * across), width)
        bottom = min(math.floor((y + padded.height) * down), height)
        seen = (left / across - x, top / down - y, right / across - x, bottom / down - y)
        grown = padded.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=seen)
        grown_hw = np.asarray(grown) > ON // 2
        return placed(grown_hw, (self.window[0] + left, self.window[1] + top))


def shrunk(picture_HW3: Pixels, word: WordAnnotation, characters: int) -> Shrunk | None:
    """The word made smaller; None where it is small enough, as nearly all words are."""
    window = window_around(word.hull, (picture_HW3.shape[0], picture_HW3.shape[1]))
    x0, y0, x1, y1 = window
    width, height = x1 - x0, y1 - y0
    share = min(LARGEST, MOST / max(characters, 1)) / (width * height)
    if share >= 1:
        return None
    factor = math.sqrt(share)
    size = max(math.floor(width * factor), 1), max(math.floor(height * factor), 1)
    crop = Image.fromarray(np.ascontiguousarray(picture_HW3[y0:y1, x0:x1]))
    smaller = np.asarray(crop.resize(size, Image.Resampling.BOX))
    polygon: Polygon = tuple(
        ((x - x0) * size[0] / width, (y - y0) * size[1] / height) for x, y in word.polygon
    )
    return Shrunk(smaller, replace(word, polygon=polygon), word, window)


def _union(masks: Iterable[PlacedMask]) -> PlacedMask:
    """All pixels of the masks, in the smallest window."""
    masks = [mask for mask in masks if mask.area]
    if not masks:
        return PlacedMask(0, 0, np.zeros((0, 0), dtype=bool))
    x, y = min(mask.x for mask in masks), min(mask.y for mask in masks)
    right = max(mask.x + mask.window_hw.shape[1] for mask in masks)
    bottom = max(mask.y + mask.window_hw.shape[0] for mask in masks)
    union_hw = np.zeros((bottom - y, right - x), dtype=bool)
    for mask in masks:
        PlacedMask(mask.x - x, mask.y - y, mask.window_hw).add_to(union_hw)
    return PlacedMask(x, y, union_hw)


def _without_small(flags: tuple[Flag, ...]) -> tuple[Flag, ...]:
    return tuple(flag for flag in flags if flag != "small")
