"""Scenes of our own, with exact masks: random walls, and words in fonts that are no templates.

Each word is coloured, bent into place and blended into a wall. Shadow, outline and panel do not
belong to its characters. One seed gives one scene. These scenes were looked at while the method was
tuned; those of `held_out` were not.
"""

import math
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFont
from scipy.ndimage import gaussian_filter, grey_dilation, shift
from skimage.color import rgb2lab

from gesso_core.annotate.char_sam.backgrounds import background, colour, noise, uniform
from gesso_core.annotate.char_sam.glyphs import SHIPPED
from gesso_core.annotate.char_sam.lettering import (
    SET_AT,
    SetWord,
    blend,
    filled,
    frame_corners,
    marked,
    placed,
    rounded,
    set_word,
)
from gesso_core.annotate.char_sam.rectify import homography
from gesso_core.annotate.char_sam.scenes import Scene, TrueCharacter
from gesso_core.annotate.char_sam.words import WordAnnotation
from gesso_core.annotate.geometry import Floats

# H, W picture   n characters


SIZE = (480, 640)
WORDS = (
    "Garden",
    "MUSEUM",
    "Tickets",
    "Library",
    "2046",
    "Ausgang",
    "LUNCH",
    "Bridge",
    "Quartz",
    "Fjord",
    "NIGHT",
    "Willow",
    "358",
    "Zone",
    "Jacket",
    "Cycles",
    "VIOLET",
    "Ginger",
    "Kiosk",
    "Wharf",
    "EMPIRE",
    "Pixel",
    "Café",
    "Möbel",
    "70%",
    "Hello!",
    "Rugby-7",
    "Attic",
)
STYLES = ("plain", "plain", "plain", "panel", "outline", "shadow")
CONTRAST = 38.0  # least CIELAB distance between text and what is behind it
TRIES = 40


def make_scene(seed: int, *, words: int = 3, size: tuple[int, int] = SIZE) -> Scene:
    """The scene of this seed."""
    generator = torch.Generator().manual_seed(seed)
    picture = background(generator, size)
    values_HW = np.zeros(size, dtype=np.uint16)
    annotations: list[WordAnnotation] = []
    characters: list[tuple[TrueCharacter, ...]] = []
    fonts = sorted((SHIPPED / "scenes").glob("*.woff2"))
    band = size[0] / words
    for number in range(words):
        font = fonts[int(torch.randint(len(fonts), (), generator=generator))]
        text = WORDS[int(torch.randint(len(WORDS), (), generator=generator))]
        word = set_word(text, ImageFont.truetype(str(font), SET_AT))
        corners = _corners(generator, word, (band * number, band * (number + 1)), size[1])
        matrix = homography(frame_corners(word), corners)
        cover_nHW = np.stack([placed(layer, matrix, size) for layer in word.cover_nhw])
        picture = _painted(generator, picture, cover_nHW, corners)
        annotations.append(WordAnnotation(text=text, polygon=rounded(corners), script="latin"))
        characters.append(marked(text, cover_nHW, values_HW))
    return Scene(
        name=f"made-{seed:03d}",
        picture_HW3=_photographed(generator, picture),
        words=tuple(annotations),
        characters=tuple(characters),
        values_HW=values_HW,
    )


def make_scenes(count: int, *, first_seed: int = 1000) -> list[Scene]:
    """Scenes of consecutive seeds."""
    return [make_scene(first_seed + number) for number in range(count)]


def _corners(
    generator: torch.Generator, word: SetWord, band: tuple[float, float], width: int
) -> Floats:
    """Where the word's corners go: turned by up to 12 degrees, slightly out of square."""
    x0, y0, x1, y1 = word.frame
    angle = math.radians(uniform(generator, -12, 12))
    room = (band[1] - band[0]) * 0.92
    height = uniform(generator, 0.25, 0.6) * room
    long = height * (x1 - x0) / (y1 - y0)
    # Both the turned height and the length must fit.
    turned = height * math.cos(angle) + long * abs(math.sin(angle))
    scale = min(1.0, room / turned, 0.9 * width / long)
    height, long = height * scale, long * scale
    square = np.array([(-long, -height), (long, -height), (long, height), (-long, height)]) / 2
    skew = 1 + 0.05 * (2 * torch.rand((4, 2), generator=generator, dtype=torch.float64).numpy() - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    turned_42 = (square * skew) @ np.array([[cos, sin], [-sin, cos]])
    half = np.abs(turned_42).max(0)
    centre_x = uniform(generator, half[0] + 4, max(width - half[0] - 4, half[0] + 5))
    placed_42: Floats = turned_42 + np.array([centre_x, (band[0] + band[1]) / 2])
    return placed_42


def _painted(
    generator: torch.Generator, picture: Floats, cover_nHW: Floats, corners: Floats
) -> Floats:
    """The word over the wall, in one of the styles."""
    style = STYLES[int(torch.randint(len(STYLES), (), generator=generator))]
    cover_HW = np.clip(cover_nHW.sum(0), 0, 1)
    if style == "panel":
        middle = corners.mean(0)
        grown = middle + (corners - middle) * (1.08, 1.25)
        picture = blend(picture, filled(grown, picture.shape[:2]), colour(generator))
    behind = picture[cover_HW > 0.5].mean(0)
    paint = _contrasting(generator, behind)
    if style == "outline":
        around = grey_dilation(cover_HW, size=(3, 3))
        picture = blend(picture, around, _contrasting(generator, paint))
    if style == "shadow":
        picture = blend(picture, 0.7 * shift(cover_HW, (2, 2), order=1), np.zeros(3))
    shade = uniform(generator, 0, 0.15) * np.linspace(-1, 1, picture.shape[1])[None, :, None]
    return blend(picture, cover_HW, np.clip(paint + shade, 0, 1))


def _contrasting(generator: torch.Generator, behind: Floats) -> Floats:
    """A colour far enough from another; black or white when chance does not find one."""
    wanted = rgb2lab(behind)
    for _ in range(TRIES):
        paint = colour(generator)
        if np.linalg.norm(rgb2lab(paint) - wanted) > CONTRAST:
            return paint
    return np.full(3, 0.0 if wanted[0] > 50 else 1.0)


def _photographed(generator: torch.Generator, picture: Floats) -> NDArray[np.uint8]:
    """Blur, grain and JPEG."""
    blurred = gaussian_filter(picture, (*[uniform(generator, 0.2, 0.9)] * 2, 0))
    grain = uniform(generator, 0.0, 0.02) * noise(generator, picture.shape[:2], 0.5)[..., None]
    pixels = (np.clip(blurred + grain, 0, 1) * 255).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(uniform(generator, 72, 96)))
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.uint8)
