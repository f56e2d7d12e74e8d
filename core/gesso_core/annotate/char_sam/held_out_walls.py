"""What the held-out scenes are written on: photographs and patterns that no other scene has.

The photographs come with scikit-image and are free of rights; grey ones are given two colours.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data

from gesso_core.annotate.char_sam.backgrounds import noise, uniform
from gesso_core.annotate.geometry import Floats

# H, W picture

PHOTOGRAPHS = (
    "camera",
    "hubble_deep_field",
    "clock",
    "retina",
    "coins",
    "immunohistochemistry",
)


def wall(generator: torch.Generator, number: int, size: tuple[int, int]) -> Floats:
    """The wall of scene ``number``, (H, W, 3), 0..1: photographs and patterns by turns."""
    turn = number // 2
    if number % 2 == 0:
        return _photograph(generator, PHOTOGRAPHS[turn % len(PHOTOGRAPHS)], size)
    return np.clip(PATTERNS[turn % len(PATTERNS)](generator, size), 0.0, 1.0)


def hue(generator: torch.Generator) -> Floats:
    """A colour as signs have it: near white, near black, or a hue."""
    kind = uniform(generator, 0, 1)
    value = uniform(generator, 0, 1)
    if kind < 0.2:
        return np.full(3, 0.88 + 0.12 * value)
    if kind < 0.4:
        return np.full(3, 0.14 * value)
    shares = np.array([uniform(generator, 0, 1) for _ in range(3)])
    spread: Floats = (shares - shares.min()) / max(float(np.ptp(shares)), 1e-9)
    return (0.35 + 0.65 * value) * (0.15 + 0.85 * spread)


def _photograph(generator: torch.Generator, name: str, size: tuple[int, int]) -> Floats:
    """A piece of a photograph, perhaps mirrored."""
    pixels = np.asarray(getattr(data, name)(), dtype=np.float64) / 255
    if pixels.ndim == 2:
        dark, light = sorted((hue(generator), hue(generator)), key=lambda paint: float(paint.sum()))
        pixels = dark + pixels[..., None] * (light - dark)
    height, width = pixels.shape[:2]
    scale = uniform(generator, 0.55, 0.95) * min(height / size[0], width / size[1])
    rows, columns = round(scale * size[0]), round(scale * size[1])
    top = int(uniform(generator, 0, height - rows + 1))
    left = int(uniform(generator, 0, width - columns + 1))
    piece = pixels[top : top + rows, left : left + columns]
    if uniform(generator, 0, 1) < 0.5:
        piece = piece[:, ::-1]
    image = Image.fromarray((piece * 255).round().astype(np.uint8))
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float64) / 255


def _tiles(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Glazed tiles in two colours, each with a highlight, and joints between them."""
    edge = int(uniform(generator, 40, 90))
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    checked = ((y // edge + x // edge) % 2)[..., None]
    glaze = hue(generator) * (1 - checked) + hue(generator) * checked
    shine = np.exp(
        -(((y % edge - 0.3 * edge) ** 2 + (x % edge - 0.3 * edge) ** 2) / (0.05 * edge**2))
    )
    surface = 0.8 * glaze + 0.12 * shine[..., None]
    surface[(y % edge < 3) | (x % edge < 3)] = 0.55
    finished: Floats = surface + 0.015 * noise(generator, size, 1)[..., None]
    return finished


def _shutter(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Ridges of sheet metal, with rust running down."""
    period = uniform(generator, 18, 46)
    y = np.arange(size[0])[:, None] + 2 * noise(generator, size, 60)
    ridge = 0.10 * np.sin(2 * np.pi * y / period)
    rust = np.clip(noise(generator, size, 12) - 0.8, 0, 1)[..., None]
    metal = 0.75 * hue(generator) + 0.1 + ridge[..., None]
    finished: Floats = metal + 0.6 * rust * (np.array([0.45, 0.22, 0.08]) - metal)
    return finished


def _foliage(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Leaves over leaves."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float64)
    leaves = np.broadcast_to(np.array([0.08, 0.14, 0.06]), (*size, 3)).copy()
    for _ in range(260):
        middle_y, middle_x = uniform(generator, 0, size[0]), uniform(generator, 0, size[1])
        angle, long = uniform(generator, 0, np.pi), uniform(generator, 12, 46)
        cos, sin = np.cos(angle), np.sin(angle)
        top, left = max(int(middle_y - long), 0), max(int(middle_x - long), 0)
        window = (slice(top, int(middle_y + long) + 1), slice(left, int(middle_x + long) + 1))
        down, across = y[window] - middle_y, x[window] - middle_x
        along, aside = cos * across + sin * down, cos * down - sin * across
        leaf = (along / long) ** 2 + (aside / (0.38 * long)) ** 2 < 1
        light = uniform(generator, 0.25, 0.85)
        leaves[window][leaf] = light * np.array([uniform(generator, 0.4, 0.9), 0.95, 0.25])
    finished: Floats = gaussian_filter(leaves, (0.8, 0.8, 0))
    return finished


def _night(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Lights out of focus before a dark street."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    street = np.broadcast_to(0.12 * hue(generator), (*size, 3)).copy()
    for _ in range(45):
        middle_y, middle_x = uniform(generator, 0, size[0]), uniform(generator, 0, size[1])
        disc = np.hypot(x - middle_x, y - middle_y) < uniform(generator, 8, 40)
        street += uniform(generator, 0.1, 0.6) * disc[..., None] * hue(generator)
    finished: Floats = gaussian_filter(street, (2.0, 2.0, 0))
    return finished


def _marble(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Veins that wander through stone."""
    angle, period = uniform(generator, 0, np.pi), uniform(generator, 60, 140)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    wandering = 5.0 * noise(generator, size, 45) + 0.8 * noise(generator, size, 8)
    along = (np.cos(angle) * x + np.sin(angle) * y) / period
    vein = np.abs(np.sin(np.pi * along + wandering)) ** 0.35
    stone, mark = hue(generator), hue(generator)
    finished: Floats = mark + (0.4 + 0.6 * vein[..., None]) * (stone - mark)
    return finished


def _awning(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Broad slanting stripes of cloth, in folds."""
    period, slant = uniform(generator, 50, 130), uniform(generator, -0.6, 0.6)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    across = (x + slant * y) / period
    stripe = (across % 1 < 0.5)[..., None]
    cloth = np.where(stripe, hue(generator), hue(generator))
    folds = 0.07 * np.sin(2 * np.pi * x / (2.7 * period) + noise(generator, size, 40))
    weave = 0.02 * noise(generator, size, 0.6)
    finished: Floats = cloth + (folds + weave)[..., None]
    return finished


PATTERNS: tuple[Callable[[torch.Generator, tuple[int, int]], Floats], ...] = (
    _tiles,
    _shutter,
    _foliage,
    _night,
    _marble,
    _awning,
)
