"""Signs that stand in a picture: a board on posts, with texts on it whose every pixel is known.

    sign = compose(picture, ["OPEN", "24 hours"], seed=7)
    sign.scene.picture_HW3, sign.scene.words, sign.scene.truth(0)

The text is set by a font and blended in, so its masks are exact: a character's pixels are those
that it covers by half or more. All that is drawn by chance is drawn in the order of `_Chance`, from
one generator per seed, and nothing of it depends on the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from gesso_core.annotate.char_sam.backgrounds import noise, uniform
from gesso_core.annotate.char_sam.lettering import blend, rounded
from gesso_core.annotate.char_sam.rectify import homography
from gesso_core.annotate.char_sam.scenes import Scene
from gesso_core.annotate.char_sam.sign_layout import Line, around, lay_out, shown
from gesso_core.annotate.char_sam.sign_painting import (
    Board,
    Size,
    box_corners,
    with_board,
    with_posts,
    write_glyph,
)
from gesso_core.annotate.char_sam.words import WordAnnotation
from gesso_core.annotate.geometry import Floats
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels

# H, W picture

PADDING = 0.5  # between text and the edge of the board, em
WIDEST, HIGHEST = 0.72, 0.52  # of the picture
SMALLEST = 0.85  # of the board, drawn against the largest that fits
LARGEST_EM = 0.24  # of the picture's height
LEAST_EM = 20.0  # pixels: smaller text is nothing to learn from
PICKS = 12  # fonts that are tried before a text is too long
YAW = 0.08  # how much longer one side of the board may look than the other, each way
ROLL = math.radians(4)
AMBIENT = 0.1  # how much of the picture's mean colour lies on the sign
SHADE = 0.1  # of the light along the board
GRAIN = 0.012
# Board and ink, as signs have them; each pair is far apart in lightness.
PALETTE = (
    ((0.94, 0.94, 0.92), (0.75, 0.08, 0.1)),
    ((0.07, 0.25, 0.55), (0.97, 0.97, 0.97)),
    ((0.05, 0.4, 0.25), (0.97, 0.97, 0.95)),
    ((0.97, 0.8, 0.1), (0.08, 0.08, 0.08)),
    ((0.73, 0.1, 0.12), (0.98, 0.97, 0.95)),
    ((0.13, 0.13, 0.15), (0.97, 0.91, 0.75)),
    ((0.95, 0.9, 0.78), (0.1, 0.25, 0.2)),
    ((0.95, 0.95, 0.95), (0.1, 0.1, 0.12)),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sign:
    """A picture with a sign in it; ``empty_HW3`` is the same before anything was written on it."""

    scene: Scene
    empty_HW3: Pixels


@dataclass(frozen=True, kw_only=True)
class _Chance:
    """Everything that is left to chance, shares from 0 to 1 where no unit is named."""

    palette: int
    font: float
    scale: float
    x: float
    y: float
    roll: float
    yaw: float
    posts: int
    light: float  # direction, radians

    @classmethod
    def draw(cls, generator: torch.Generator) -> "_Chance":
        return cls(
            palette=int(torch.randint(len(PALETTE), (), generator=generator)),
            font=uniform(generator, 0, 1),
            scale=uniform(generator, SMALLEST, 1),
            x=uniform(generator, 0, 1),
            y=uniform(generator, 0, 1),
            roll=uniform(generator, -ROLL, ROLL),
            yaw=uniform(generator, -YAW, YAW),
            posts=1 + int(torch.randint(2, (), generator=generator)),
            light=uniform(generator, 0, 2 * math.pi),
        )


def check_texts(texts: Sequence[str], size: Size, *, fonts: Path | None = None) -> None:
    """InvalidRequest, naming ``words.N``, for a text that no font here can write; and for texts
    that would be too small to read on a sign in a picture of this size (height, width).
    """
    _fitting_lines(texts, size, 0.0, fonts)


def compose(
    picture_HW3: Pixels,
    texts: Sequence[str],
    *,
    seed: int,
    fonts: Path | None = None,
    name: str = "sign",
) -> Sign:
    """A sign with these texts, one line each, in the picture. Raises like `check_texts`.

    The same seed gives the same sign, whatever else is composed.
    """
    size = (picture_HW3.shape[0], picture_HW3.shape[1])
    generator = torch.Generator().manual_seed(seed)
    chance = _Chance.draw(generator)
    lines = _fitting_lines(texts, size, chance.font, fonts)
    board = _placed(chance, lines, size)
    face, ink = (np.array(paint) for paint in PALETTE[chance.palette])
    picture = picture_HW3 / 255.0
    light_HW = _light(chance, size) + GRAIN * noise(generator, size, 0.6)

    def lit(paint: Floats) -> Floats:
        """The paint as it looks there, per pixel."""
        tinted = paint + AMBIENT * (picture.mean((0, 1)) - paint)
        shone: Floats = light_HW[..., None] * tinted
        return shone

    picture = with_posts(picture, board, chance.posts, lit)
    picture = with_board(picture, board, lit(face), lit(ink))
    values_HW = np.zeros(size, dtype=np.uint16)
    cover_HW = np.zeros(size)
    characters = tuple(
        tuple(write_glyph(glyph, board, cover_HW, values_HW) for glyph in line.glyphs)
        for line in lines
    )
    return Sign(
        scene=Scene(
            name=name,
            picture_HW3=_pixels(blend(picture, cover_HW, lit(ink))),
            words=tuple(
                WordAnnotation(text=line.text, polygon=rounded(board.in_picture(line.frame)))
                for line in lines
            ),
            characters=characters,
            values_HW=values_HW,
        ),
        empty_HW3=_pixels(picture),
    )


def enlarged(pixels_HWC: Pixels, size: Size) -> Pixels:
    """The middle of a picture, brought to this size (height, width) by Lanczos; proportions are
    kept.
    """
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    fitted = ImageOps.fit(Image.fromarray(pixels_HWC), size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8)


def _fitting_lines(texts: Sequence[str], size: Size, pick: float, fonts: Path | None) -> list[Line]:
    """The texts in the font that was picked, or in the next one that is narrow enough; raises like
    `check_texts` where none is.
    """
    largest: list[Line] = []
    for turn in range(PICKS):
        lines = lay_out(texts, pick=(pick + turn / PICKS) % 1, fonts=fonts)
        if SMALLEST * _largest_em(lines, size) >= LEAST_EM:
            return lines
        if not largest or _largest_em(lines, size) > _largest_em(largest, size):
            largest = lines
    raise _too_small(texts, largest, size)


def _too_small(texts: Sequence[str], lines: Sequence[Line], size: Size) -> InvalidRequest:
    """Which of the texts is too long for the board, or that there are too many of them."""
    widths = [line.ink[2] - line.ink[0] for line in lines]
    longest = max(range(len(lines)), key=widths.__getitem__)
    wide = SMALLEST * WIDEST * size[1] / (widths[longest] + 2 * PADDING) < LEAST_EM
    what = f"the text {shown(texts[longest])}" if wide else f"{len(texts)} lines of text"
    remedy = "a shorter text" if wide else "fewer words"
    return InvalidRequest(
        f"{what} would be {SMALLEST * _largest_em(lines, size):.0f} pixels high on a sign in a "
        f"{size[1]}x{size[0]} picture, and less than {LEAST_EM:.0f} cannot be labelled; give "
        f"{remedy}, or a larger size",
        field=f"words.{longest}" if wide else "words",
    )


def _half_board(lines: Sequence[Line]) -> tuple[float, float]:
    """Half the width and half the height of the board that the lines need, em."""
    x0, y0, x1, y1 = around([line.ink for line in lines])
    return (x1 - x0) / 2 + PADDING, (y1 - y0) / 2 + PADDING


def _largest_em(lines: Sequence[Line], size: Size) -> float:
    """The largest font size, pixels, at which the board stays within its share of the picture."""
    half_width, half_height = _half_board(lines)
    return min(WIDEST * size[1] / (2 * half_width), HIGHEST * size[0] / (2 * half_height))


def _placed(chance: _Chance, lines: Sequence[Line], size: Size) -> Board:
    """The board that the lines need, turned a little and put somewhere low in the picture."""
    half = _half_board(lines)
    em = min(_largest_em(lines, size) * chance.scale, LARGEST_EM * size[0])
    flat = box_corners((-half[0], -half[1], half[0], half[1]))
    corners = em * flat
    corners[:, 1] *= 1 + chance.yaw * np.sign(corners[:, 0])
    cos, sin = math.cos(chance.roll), math.sin(chance.roll)
    corners = corners @ np.array([[cos, sin], [-sin, cos]])
    reach = np.abs(corners).max(0) + 0.02 * np.array(size[::-1])
    # Low in the picture, so that what was drawn is seen above, and room for the posts is left.
    low = np.array([reach[0], max(reach[1], 0.52 * size[0])])
    high = np.array([size[1] - reach[0], min(size[0] - reach[1] - 0.08 * size[0], 0.74 * size[0])])
    low = np.minimum(low, np.maximum(high, reach))
    placed_42 = corners + low + np.array([chance.x, chance.y]) * np.maximum(high - low, 0)
    return Board(half=half, em=em, matrix_33=homography(flat, placed_42))


def _light(chance: _Chance, size: Size) -> Floats:
    """How bright the sign is at each pixel, about 1."""
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    slope: Floats = (math.cos(chance.light) * x + math.sin(chance.light) * y) / math.sqrt(2)
    return 1 + SHADE * slope


def _pixels(picture: Floats) -> Pixels:
    pixels: Pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels
