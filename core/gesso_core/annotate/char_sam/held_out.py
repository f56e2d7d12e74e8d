"""Scenes that the method had never met when its numbers were taken.

Fonts, words, walls, colours, styles, perspective, light and camera are others than in the scenes
that the method was tuned on. The set was fixed before the method saw it for the first time: it is
for measuring, and whoever tunes the method on it has to make another one.
"""

import math
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFont
from scipy.ndimage import gaussian_filter, gaussian_filter1d, shift
from skimage.color import rgb2lab

from gesso_core.annotate.char_sam.backgrounds import noise, uniform
from gesso_core.annotate.char_sam.glyphs import SHIPPED
from gesso_core.annotate.char_sam.held_out_walls import hue, wall
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

# H, W picture   n characters   m pixels behind a word

FOLDER = SHIPPED / "held_out"
FIRST_SEED = 90000
PER_SCENE = 3
SIZES = ((480, 640), (540, 720), (600, 600))
# Each word is used once, three to a scene, and each font six times.
WORDS = (
    *("Pharmacy", "K", "TROUT", "Mississippi", "42", "Naïve", "BALLOON", "butterfly", "Gate-6"),
    *("Screwdriver", "ZOO", "jumbo", "Crème", "HAMMOCK", "9", "£3.85", "Kindergarten", "wool"),
    *("Señor", "PUDDING", "fish&chips", "6th", "Rhythm", "SWALLOW", "Straße", "Bookkeeper"),
    *("7:45", "Ox", "illicit", "DOCK-12", "Grapefruit", "Éclair", "MAYOR", "tunnel"),
    *("Photographers", "g", "Yes?", "EQUINOX", "Whiskey", "100m", "Vineyard", "Ångström"),
    *("LADDER", "apricot", "Dr.Voss", "00:59", "Thunderstorms", "JAZZ", "Ferry", "sauerkraut"),
    *("MMXXVI", "Bijou", "Forêt", "WAFFLES!", "pebble", "8899", "Understandings", "Hmm..."),
    *("OBELISK", "Clockmaker", "Løve", "(B)", "Tattoo", "UPHILL", "vacuum", "No.5"),
    *("Lighthouse", "Inn", "CONSTELLATIONS", "Zigzag", "3+1=4", "Umbrellas"),
)
FONTS = (
    "cabin-latin-500-normal",  # humanist sans
    "rokkitt-latin-600-normal",  # slab serif
    "fjalla-one-latin-400-normal",  # condensed
    "varela-round-latin-400-normal",  # rounded
    "pacifico-latin-400-normal",  # joined script
    "space-mono-latin-700-normal",  # monospace
    "work-sans-latin-300-normal",  # light
    "abril-fatface-latin-400-normal",  # fat strokes beside hairlines
    "patrick-hand-latin-400-normal",  # handwriting
    "vollkorn-latin-500-italic",  # italic serif
    "exo-2-latin-600-normal",  # square
    "stardos-stencil-latin-400-normal",  # stencil: broken strokes
)
STYLES = ("plain",) * 4 + ("board",) * 2 + ("gradient", "glow", "worn", "raised")
CONTRAST = 30.0  # least CIELAB distance of the paint from nine tenths of what is behind it
TRIES = 60
SCENES = len(WORDS) // PER_SCENE


def held_out_scenes(count: int = SCENES) -> list[Scene]:
    """The first ``count`` scenes of the set, at most all."""
    return [held_out_scene(number) for number in range(min(count, SCENES))]


def held_out_scene(number: int) -> Scene:
    """Scene ``number`` of the set, always the same."""
    generator = torch.Generator().manual_seed(FIRST_SEED + number)
    size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
    picture = wall(generator, number, size)
    values_HW = np.zeros(size, dtype=np.uint16)
    annotations: list[WordAnnotation] = []
    characters: list[tuple[TrueCharacter, ...]] = []
    band = size[0] / PER_SCENE
    for place in range(PER_SCENE):
        text = WORDS[PER_SCENE * number + place]
        word = set_word(text, _font(PER_SCENE * number + place))
        corners = _corners(generator, word, (band * place, band * (place + 1)), size[1])
        matrix = homography(frame_corners(word), corners)
        cover_nHW = np.stack([placed(layer, matrix, size) for layer in word.cover_nhw])
        picture = _painted(generator, picture, cover_nHW, corners)
        annotations.append(WordAnnotation(text=text, polygon=rounded(corners), script="latin"))
        characters.append(marked(text, cover_nHW, values_HW))
    return Scene(
        name=f"held-out-{number:02d}",
        picture_HW3=_photographed(generator, _lit(generator, picture)),
        words=tuple(annotations),
        characters=tuple(characters),
        values_HW=values_HW,
    )


def _font(number: int) -> ImageFont.FreeTypeFont:
    """The font of word ``number``: every twelve words each font once, in shifting order."""
    name = FONTS[(5 * number + number // len(FONTS)) % len(FONTS)]
    # The basic layout is in every build of Pillow, so a word is set alike everywhere.
    return ImageFont.truetype(
        str(FOLDER / f"{name}.woff2"), SET_AT, layout_engine=ImageFont.Layout.BASIC
    )


def _corners(
    generator: torch.Generator, word: SetWord, band: tuple[float, float], width: int
) -> Floats:
    """Where the word's corners go: seen from the side, slanted, turned by up to 15 degrees."""
    x0, y0, x1, y1 = word.frame
    room = 0.94 * (band[1] - band[0])
    height = uniform(generator, 0.35, 0.8) * room
    long = height * (x1 - x0) / (y1 - y0)
    corners = np.array([(-long, -height), (long, -height), (long, height), (-long, height)]) / 2
    far = [0, 3] if uniform(generator, 0, 1) < 0.5 else [1, 2]
    corners[far, 1] *= 1 - uniform(generator, 0, 0.22)
    corners[:, 0] += uniform(generator, -0.18, 0.18) * corners[:, 1]
    angle = math.radians(uniform(generator, -15, 15))
    cos, sin = math.cos(angle), math.sin(angle)
    corners = corners @ np.array([[cos, sin], [-sin, cos]])
    half = (corners.max(0) - corners.min(0)) / 2
    corners *= min(1.0, room / 2 / half[1], 0.95 * width / 2 / half[0])
    corners -= (corners.max(0) + corners.min(0)) / 2
    half = corners.max(0)
    centre_x = uniform(generator, half[0] + 3, width - half[0] - 3)
    moved: Floats = corners + np.array([centre_x, (band[0] + band[1]) / 2])
    return moved


def _painted(
    generator: torch.Generator, picture: Floats, cover_nHW: Floats, corners: Floats
) -> Floats:
    """The word over the wall, in one of the styles."""
    style = STYLES[int(torch.randint(len(STYLES), (), generator=generator))]
    cover_HW = np.clip(cover_nHW.sum(0), 0, 1)
    if style == "board":
        middle = corners.mean(0)
        board_HW = filled(middle + (corners - middle) * (1.1, 1.3), picture.shape[:2])
        picture = blend(picture, gaussian_filter(board_HW, 0.8), hue(generator))
    behind_m3 = picture[filled(corners, picture.shape[:2]) > 0.5]
    paint = _legible(generator, behind_m3)
    if style == "gradient":
        ramp_HW = _downwards(corners, picture.shape[:2])[..., None]
        paint = paint + 0.6 * ramp_HW * (_legible(generator, behind_m3) - paint)
    if style == "glow":
        halo_HW = np.clip(1.4 * gaussian_filter(cover_HW, 4), 0, 0.7)
        picture = blend(picture, halo_HW, _legible(generator, np.atleast_2d(paint)))
    if style == "raised":
        dark_HW = 0.6 * gaussian_filter(shift(cover_HW, (3, 2), order=1), 1.2)
        picture = blend(picture, dark_HW, np.zeros(3))
    if style == "worn":
        cover_HW = cover_HW * (1 - 0.55 * np.clip(noise(generator, cover_HW.shape, 3) - 0.6, 0, 1))
    return blend(picture, cover_HW, paint)


def _legible(generator: torch.Generator, behind_m3: Floats) -> Floats:
    """A colour that stands out from nearly all that is behind; the best one tried if none does."""
    wanted_m3 = rgb2lab(np.clip(behind_m3[::7], 0, 1))
    best, farthest = np.zeros(3), -1.0
    for _ in range(TRIES):
        paint = hue(generator)
        apart = float(np.quantile(np.linalg.norm(wanted_m3 - rgb2lab(paint), axis=1), 0.1))
        if apart > farthest:
            best, farthest = paint, apart
        if apart > CONTRAST:
            break
    return best


def _downwards(corners: Floats, size: tuple[int, ...]) -> Floats:
    """0 along the word's upper edge, 1 along its lower one, (H, W)."""
    top, bottom = corners[:2].mean(0), corners[2:].mean(0)
    down = (bottom - top) / float(((bottom - top) ** 2).sum())
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    ramp: Floats = np.clip((x - top[0]) * down[0] + (y - top[1]) * down[1], 0, 1)
    return ramp


def _lit(generator: torch.Generator, picture: Floats) -> Floats:
    """Darker towards the corners, and in a third of the scenes a shadow across."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = 1 - uniform(generator, 0, 0.3) * (x**2 + y**2) / 2
    if uniform(generator, 0, 1) < 1 / 3:
        angle, where = uniform(generator, 0, 2 * math.pi), uniform(generator, -0.5, 0.5)
        shaded = (math.cos(angle) * x + math.sin(angle) * y > where).astype(np.float64)
        light = light * (1 - uniform(generator, 0.15, 0.4) * gaussian_filter(shaded, 2.5))
    dimmed: Floats = np.clip(picture, 0, 1) * light[..., None]
    return dimmed


def _photographed(generator: torch.Generator, picture: Floats) -> NDArray[np.uint8]:
    """Out of focus or moved, with grain in every channel, kept as JPEG."""
    blurred = gaussian_filter(picture, (*[uniform(generator, 0.3, 1.1)] * 2, 0))
    if uniform(generator, 0, 1) < 0.25:
        blurred = gaussian_filter1d(blurred, uniform(generator, 0.8, 1.6), axis=1)
    strength = uniform(generator, 0, 0.025)
    grain = np.stack([noise(generator, picture.shape[:2], 0.6) for _ in range(3)], axis=-1)
    pixels = (np.clip(blurred + strength * grain, 0, 1) * 255).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(uniform(generator, 60, 95)))
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.uint8)
