"""Where rays meet cars and blocks: what the synthetic camera and LiDAR are made of."""

# P rays

from dataclasses import dataclass
from functools import singledispatch
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.kitti.boxes import rotate_y
from gesso_core.annotate.slf.procedural_cars import Car, car_distance
from gesso_core.annotate.slf.sdf import Grid, sample

_VOXEL: Final = 0.05  # finer than the prior's, so that the truth is not of the prior's making
_ROOM: Final = 0.2  # metres of grid around the car
_STEPS: Final = 48
_ACROSS: Final = 8.0  # metres in which a ray has left any car
_HIT: Final = 0.01  # metres


@dataclass(frozen=True)
class Block:
    """A box (h, w, l, x, y, z, ry) that stands in the way."""

    box: tuple[float, ...]


@dataclass(frozen=True)
class Solid:
    """A car as a distance grid, standing at (x, y, z) with rotation_y."""

    grid: Grid
    position: tuple[float, float, float]
    angle: float

    def inside_frame(self, points_P3: Floats) -> Floats:
        """Points of the rectified camera frame in the car's own frame."""
        return turned(points_P3 - np.array(self.position), self.angle)


def turned(vectors_P3: Floats, angle: float) -> Floats:
    """R_y(angle)^T of each vector."""
    return np.asarray(rotate_y(vectors_P3[None], np.array([-angle]))[0])


def solid_of(car: Car, box: tuple[float, ...]) -> Solid:
    """The car at its place, on a fine grid of half of it."""
    low = np.array([-car.length / 2 - _ROOM, -car.height - _ROOM, 0.0])
    high = np.array([car.length / 2 + _ROOM, _ROOM, car.width / 2 + _ROOM])
    x, y, z = (np.arange(a, b + _VOXEL, _VOXEL) for a, b in zip(low, high, strict=True))
    values = torch.from_numpy(car_distance(car, x, y, z).astype(np.float32))
    grid = Grid(values, torch.from_numpy(low).float(), _VOXEL, mirrored=True)
    return Solid(grid, (box[3], box[4], box[5]), box[6])


@singledispatch
def cast(thing: Block | Solid, origin_3: Floats, rays_P3: Floats) -> Floats:
    """Distance (P,) along unit rays to the surface; infinite where they miss."""
    raise TypeError(f"cannot cast rays at a {type(thing).__name__}")


@cast.register
def _(thing: Block, origin_3: Floats, rays_P3: Floats) -> Floats:
    h, w, length, *position, angle = thing.box
    start = turned((origin_3 - np.array(position))[None], angle)
    rays = turned(rays_P3, angle)
    return _slabs(
        start, rays, np.array([-length / 2, -h, -w / 2]), np.array([length / 2, 0, w / 2])
    )


@cast.register
def _(thing: Solid, origin_3: Floats, rays_P3: Floats) -> Floats:
    start, rays = thing.inside_frame(origin_3[None]), turned(rays_P3, thing.angle)
    size = np.array(thing.grid.size) - 1
    low = thing.grid.origin_3.double().numpy()
    high = low + thing.grid.voxel * size
    low[2] = -high[2]
    reach = _slabs(start, rays, low, high)
    near = np.flatnonzero(np.isfinite(reach))
    enter = torch.from_numpy(reach[near]).float()
    way, begin = torch.from_numpy(rays[near]).float(), torch.from_numpy(start).float()
    reach[near] = _trace(thing.grid, begin, way, enter).double().numpy()
    return reach


def _trace(grid: Grid, begin_13: Tensor, way_P3: Tensor, enter_P: Tensor) -> Tensor:
    """Sphere tracing: the distance to anything is a safe step. Infinite where nothing is hit."""
    t = enter_P.clone()
    found = torch.full_like(t, torch.inf)
    going = torch.arange(len(t))
    for _ in range(_STEPS):
        points = begin_13 + t[going, None] * way_P3[going]
        distance = sample(grid, points[None])[0]
        hit = distance <= _HIT
        found[going[hit]] = t[going[hit]]
        t[going] += distance
        going = going[~hit & (t[going] < enter_P[going] + _ACROSS)]
    return found


def _slabs(start_13: Floats, rays_P3: Floats, low_3: Floats, high_3: Floats) -> Floats:
    """Distance to an axis-aligned box; infinite where the ray misses it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        to_low, to_high = (low_3 - start_13) / rays_P3, (high_3 - start_13) / rays_P3
    enter = np.nanmax(np.minimum(to_low, to_high), axis=1)
    leave = np.nanmin(np.maximum(to_low, to_high), axis=1)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)
