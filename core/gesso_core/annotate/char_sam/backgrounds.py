"""Walls and posters to write on, made from nothing but random numbers."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from gesso_core.annotate.geometry import Floats

# H, W picture


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number between low and high."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def noise(generator: torch.Generator, size: tuple[int, int], sigma: float) -> Floats:
    """Smooth noise of unit spread, (H, W)."""
    rough = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    smooth: Floats = gaussian_filter(rough, sigma, mode="reflect")
    return smooth / max(float(smooth.std()), 1e-9)


def colour(generator: torch.Generator) -> Floats:
    """An RGB colour, 0..1."""
    drawn: Floats = torch.rand(3, generator=generator, dtype=torch.float64).numpy()
    return drawn


def background(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """A wall (H, W, 3), 0..1; which kind is drawn first."""
    kind = int(torch.randint(len(KINDS), (), generator=generator))
    return np.clip(KINDS[kind](generator, size), 0.0, 1.0)


def _plaster(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """A shade running across, with stains and grain."""
    height, width = size
    first, second = colour(generator), colour(generator)
    slope = uniform(generator, -1, 1)
    y, x = np.mgrid[0:height, 0:width]
    share = np.clip(0.5 + slope * (x / width - 0.5) + (1 - abs(slope)) * (y / height - 0.5), 0, 1)
    wall = first + share[..., None] * 0.4 * (second - first)
    stains = 0.04 * noise(generator, size, 30) + 0.015 * noise(generator, size, 1)
    finished: Floats = wall + stains[..., None]
    return finished


def _bricks(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Courses of bricks, each of its own shade."""
    height, width = size
    brick_height = int(uniform(generator, 24, 56))
    brick_width = 2 * brick_height + int(uniform(generator, 0, 30))
    rows, columns = np.mgrid[0:height, 0:width]
    course = rows // brick_height
    shifted = columns + (course % 2) * (brick_width // 2)
    number = course * 97 + (shifted // brick_width) * 31
    shades = 0.12 * torch.randn(512, generator=generator, dtype=torch.float64).numpy()
    base, mortar = colour(generator), colour(generator)
    wall = base + shades[number % 512][..., None]
    joint = (rows % brick_height < 3) | (shifted % brick_width < 3)
    wall[joint] = mortar
    finished: Floats = wall + 0.03 * noise(generator, size, 0.8)[..., None]
    return finished


def _boards(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Grain along one direction."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    angle, period = uniform(generator, 0, np.pi), uniform(generator, 8, 40)
    along = np.cos(angle) * x + np.sin(angle) * y
    grain = np.sin(2 * np.pi * along / period + 1.5 * noise(generator, size, 25))
    base = colour(generator)
    finished: Floats = base + (0.08 * grain + 0.02 * noise(generator, size, 1))[..., None]
    return finished


def _poster(generator: torch.Generator, size: tuple[int, int]) -> Floats:
    """Overlapping discs of different colours."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    wall = np.broadcast_to(colour(generator), (*size, 3)).copy()
    for _ in range(14):
        centre_x, centre_y = uniform(generator, 0, size[1]), uniform(generator, 0, size[0])
        radius = uniform(generator, 30, 170)
        paint, share = colour(generator), uniform(generator, 0.3, 0.9)
        disc = np.hypot(x - centre_x, y - centre_y) < radius
        wall[disc] += share * (paint - wall[disc])
    finished: Floats = (
        gaussian_filter(wall, (0.7, 0.7, 0)) + 0.015 * noise(generator, size, 0.7)[..., None]
    )
    return finished


KINDS: tuple[Callable[[torch.Generator, tuple[int, int]], Floats], ...] = (
    _plaster,
    _bricks,
    _boards,
    _poster,
)
