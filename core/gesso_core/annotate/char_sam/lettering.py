"""Set a word in a font, bend it into place, blend it in, and keep the mask of every character.

What scenes that gesso draws itself have in common. A character's mask is exact: the pixels that it
covers by half or more, before blur and grain.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gesso_core.annotate.char_sam.scenes import TrueCharacter
from gesso_core.annotate.geometry import Box, Floats
from gesso_core.annotate.masks import box_of_mask

# H, W picture   h, w word as set   n characters


SET_AT = 96  # pixels, before a word is put in place
PAD = 12


@dataclass(frozen=True, eq=False)
class SetWord:
    """A word as set by a font: the coverage of each character (n, h, w), and its frame there."""

    text: str
    cover_nhw: Floats
    frame: Box


def set_word(text: str, font: ImageFont.FreeTypeFont) -> SetWord:
    """Each character on a layer of its own, where the font puts it."""
    left, top, right, bottom = (float(edge) for edge in font.getbbox(text))
    size = (math.ceil(right - left) + 2 * PAD, math.ceil(bottom - top) + 2 * PAD)
    layers = []
    for place, character in enumerate(text):
        layer = Image.new("L", size)
        pen = PAD - left + font.getlength(text[:place])
        ImageDraw.Draw(layer).text((pen, PAD - top), character, fill=255, font=font)
        layers.append(np.asarray(layer, dtype=np.float64) / 255)
    margin = 0.06 * (bottom - top)
    frame = (PAD - margin, PAD - margin, size[0] - PAD + margin, size[1] - PAD + margin)
    return SetWord(text, np.stack(layers), frame)


def frame_corners(word: SetWord) -> Floats:
    """The frame's corners (4, 2), clockwise from the top left."""
    x0, y0, x1, y1 = word.frame
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def placed(layer_hw: Floats, matrix_33: Floats, size: tuple[int, int]) -> Floats:
    """The layer in the picture: twice as fine, then halved, so that edges are smooth."""
    finer = np.diag([2.0, 2.0, 1.0]) @ matrix_33
    inverse = np.linalg.inv(finer)
    image = Image.fromarray((layer_hw * 255).round().astype(np.uint8))
    large = image.transform(
        (2 * size[1], 2 * size[0]),
        Image.Transform.PERSPECTIVE,
        tuple((inverse / inverse[2, 2]).ravel()[:8]),
        Image.Resampling.BILINEAR,
    )
    cover: Floats = np.asarray(large, dtype=np.float64) / 255
    halved: Floats = cover.reshape(size[0], 2, size[1], 2).mean((1, 3))
    return halved


def blend(picture: Floats, cover_HW: Floats, paint: Floats) -> Floats:
    """The picture under paint: one colour (3,) or one per pixel (H, W, 3)."""
    return picture + cover_HW[..., None] * (paint - picture)


def filled(corners: Floats, size: tuple[int, ...]) -> Floats:
    """1 inside the polygon, 0 outside, (H, W)."""
    canvas = Image.new("L", (size[1], size[0]))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in corners], fill=255)
    return np.asarray(canvas, dtype=np.float64) / 255


def marked(
    text: str, cover_nHW: Floats, values_HW: NDArray[np.uint16]
) -> tuple[TrueCharacter, ...]:
    """Enter the characters into the index mask; what a later one covers is its own."""
    first, found = int(values_HW.max()) + 1, []
    for place, (character, cover_HW) in enumerate(zip(text, cover_nHW, strict=True)):
        ink_HW = cover_HW >= 0.5
        values_HW[ink_HW] = first + place
        x0, y0, x1, y1 = (float(edge) for edge in box_of_mask(ink_HW))
        found.append(TrueCharacter(char=character, box=(x0, y0, x1, y1), value=first + place))
    return tuple(found)


def rounded(corners: Floats) -> tuple[tuple[float, float], ...]:
    """The corners as an annotation's polygon."""
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in corners)
