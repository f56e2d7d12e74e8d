"""The parts of a sign as paint in a picture: posts, board, and glyphs that know their pixels.

What lies on the board is given in em from its middle, x to the right and y down; `Board` says where
that is in the picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, shift

from gesso_core.annotate.char_sam.lettering import blend, placed
from gesso_core.annotate.char_sam.scenes import TrueCharacter
from gesso_core.annotate.char_sam.sign_layout import Glyph
from gesso_core.annotate.char_sam.words import hull_of
from gesso_core.annotate.geometry import Box, Floats
from gesso_core.annotate.masks import box_of_mask

# H, W picture   h, w window of it   u, v coordinates on the board, em

Size = tuple[int, int]  # height, width
Lit = Callable[[Floats], Floats]

BORDER = 0.17  # where the line along the edge runs, em
SHADOW = 0.4
EDGE = 4  # pixels around a layer, so that its edges are smooth where it is put
STEEL, WOOD = (0.55, 0.57, 0.6), (0.45, 0.32, 0.2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Board:
    """A board in a picture.

    Attributes:
        half: half its width and half its height, em.
        em: the font size, pixels of the picture.
        matrix_33: the perspective map from the board to the picture.
    """

    half: tuple[float, float]
    em: float
    matrix_33: Floats

    def in_picture(self, box: Box) -> Floats:
        """The corners (4, 2) of a box on the board, clockwise from the upper left."""
        return _mapped(self.matrix_33, box_corners(box))


def with_posts(picture: Floats, board: Board, count: int, lit: Lit) -> Floats:
    """One post of steel under the middle, or two of wood; the left half of each has more light."""
    size = (picture.shape[0], picture.shape[1])
    paint = np.array(STEEL if count == 1 else WOOD)
    width = board.half[0]
    thick, below = min(0.07 * width, 0.16), board.half[1] + 2 * size[0] / board.em
    for middle in (0.0,) if count == 1 else (-0.6 * width, 0.6 * width):
        for left, right, share in ((-thick, thick, 0.8), (-thick, 0.0, 1.1)):
            corners = board.in_picture((middle + left, 0.0, middle + right, below))
            picture = blend(picture, _shape(corners, size), lit(share * paint))
    return picture


def with_board(picture: Floats, board: Board, face: Floats, line: Floats) -> Floats:
    """The empty board with its shadow, and a line along its edge."""
    size, half, scale = (picture.shape[0], picture.shape[1]), board.half, 2 * board.em
    width, height = (round(2 * side * scale) for side in half)
    surface = Image.new("L", (width + 2 * EDGE, height + 2 * EDGE))
    border = surface.copy()
    whole = (EDGE, EDGE, EDGE + width - 1, EDGE + height - 1)
    ImageDraw.Draw(surface).rounded_rectangle(whole, radius=0.25 * scale, fill=255)
    inset = round(BORDER * scale)
    ImageDraw.Draw(border).rounded_rectangle(
        (whole[0] + inset, whole[1] + inset, whole[2] - inset, whole[3] - inset),
        radius=0.14 * scale,
        outline=255,
        width=max(2, round(0.05 * scale)),
    )
    to_board = _scaled(1 / scale, (-half[0] - EDGE / scale, -half[1] - EDGE / scale))
    covers = [
        placed(np.asarray(layer) / 255.0, board.matrix_33 @ to_board, size)
        for layer in (surface, border)
    ]
    dropped = shift(covers[0], (0.02 * size[0], 0.012 * size[1]), order=1)
    picture = blend(picture, SHADOW * gaussian_filter(dropped, 0.01 * size[1]), np.zeros(3))
    return blend(blend(picture, covers[0], face), covers[1], line)


def write_glyph(
    glyph: Glyph, board: Board, cover_HW: Floats, values_HW: NDArray[np.uint16]
) -> TrueCharacter:
    """Enter a glyph into the cover of all text and, as the next value, into the index mask."""
    size = max(round(2 * board.em), 1)
    font = _sized(str(glyph.font.path), size)
    left, top, right, bottom = (math.floor(edge) for edge in font.getbbox(glyph.char, anchor="ls"))
    layer = Image.new("L", (right - left + 2 * EDGE + 1, bottom - top + 2 * EDGE + 1))
    ImageDraw.Draw(layer).text((EDGE - left, EDGE - top), glyph.char, 255, font, anchor="ls")
    corner = (glyph.pen[0] + (left - EDGE) / size, glyph.pen[1] + (top - EDGE) / size)
    to_picture = board.matrix_33 @ _scaled(1 / size, corner)
    x0, y0, x1, y1 = _window(_mapped(to_picture, box_corners((0, 0, *layer.size))), cover_HW.shape)
    window_hw = placed(
        np.asarray(layer) / 255.0, _scaled(1.0, (-x0, -y0)) @ to_picture, (y1 - y0, x1 - x0)
    )
    covered, values = cover_HW[y0:y1, x0:x1], values_HW[y0:y1, x0:x1]
    np.maximum(covered, window_hw, out=covered)
    value, ink_hw = int(values_HW.max()) + 1, window_hw >= 0.5
    values[ink_hw] = value
    left, top, right, bottom = box_of_mask(ink_hw)
    box = (float(x0 + left), float(y0 + top), float(x0 + right), float(y0 + bottom))
    return TrueCharacter(char=glyph.char, box=box, value=value)


@lru_cache(maxsize=64)
def _sized(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def box_corners(box: Box) -> Floats:
    """The corners (4, 2) of a box, clockwise from the upper left."""
    x0, y0, x1, y1 = box
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def _scaled(factor: float, shift_uv: tuple[float, float]) -> Floats:
    """The map that scales, then shifts."""
    return np.array([(factor, 0, shift_uv[0]), (0, factor, shift_uv[1]), (0, 0, 1)], np.float64)


def _mapped(matrix_33: Floats, points_N2: Floats) -> Floats:
    mapped = np.column_stack([points_N2, np.ones(len(points_N2))]) @ matrix_33.T
    flat: Floats = mapped[:, :2] / mapped[:, 2:]
    return flat


def _window(corners: Floats, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The pixels around corners, at least one of them inside the picture."""
    x0, y0, x1, y1 = hull_of(corners)
    left, top = (min(max(math.floor(a), 0), n - 1) for a, n in ((x0, size[1]), (y0, size[0])))
    right, bottom = (
        max(min(math.ceil(x1), size[1]), left + 1),
        max(min(math.ceil(y1), size[0]), top + 1),
    )
    return left, top, right, bottom


def _shape(corners: Floats, size: Size) -> Floats:
    """1 inside the polygon, 0 outside, smooth between, (H, W)."""
    canvas = Image.new("L", (2 * size[1], 2 * size[0]))
    ImageDraw.Draw(canvas).polygon([(2 * x, 2 * y) for x, y in corners.tolist()], fill=255)
    return np.asarray(canvas.reduce(2), dtype=np.float64) / 255
