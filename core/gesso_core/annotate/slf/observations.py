"""What the fit sees of each object, as tensors of equal size that stack into one batch."""

# B objects   P pixels   N points   S start poses

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gesso_core.annotate.geometry import Box, Floats
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.slf.ground import Ground
from gesso_core.annotate.slf.lift import Starts
from gesso_core.annotate.slf.overlaps import OwnedMask

MARGIN: Final = 0.12  # of the box's side, added on each of its sides
PIXELS: Final = (14, 28)  # rows and columns compared with the mask
COARSE_PIXELS: Final = (10, 20)
POINTS: Final = 128
COARSE_POINTS: Final = 40


@dataclass(frozen=True)
class Raster:
    """Pixels that are compared with the mask."""

    directions_BP3: Tensor  # unit vectors, camera frame
    mask_BP: Tensor  # 1 inside the mask
    weight_BP: Tensor  # 0 where a nearer object hides this one


@dataclass(frozen=True)
class Returns:
    """LiDAR returns on the objects; padded ones have weight 0."""

    points_BN3: Tensor
    towards_lidar_BN3: Tensor  # unit vectors
    weight_BN: Tensor  # sums to 1 over an object's returns, or to 0 without any


@dataclass(frozen=True)
class Observations:
    """A batch of objects, of one picture or of many."""

    origin_B3: Tensor  # the camera
    fine: Raster
    coarse: Raster
    returns: Returns
    coarse_returns: Returns
    ground_B3: Tensor  # a, b, c of y = a x + b z + c
    start_positions_BS3: Tensor
    start_angles_BS: Tensor

    def __len__(self) -> int:
        return len(self.origin_B3)


Part = TypeVar("Part", Observations, Raster, Returns)


def observe(
    owned: OwnedMask,
    box: Box,
    points_N3: Floats,
    starts: Starts,
    calibration: Calibration,
    ground: Ground,
) -> Observations:
    """One object: a raster over its box, its returns, the ground, its start poses."""
    lidar = calibration.rect_from_velo(np.zeros((1, 3)))[0]
    return Observations(
        origin_B3=_tensor(calibration.camera_center),
        fine=_raster(owned, box, calibration, *PIXELS),
        coarse=_raster(owned, box, calibration, *COARSE_PIXELS),
        returns=_returns(points_N3, lidar, POINTS),
        coarse_returns=_returns(points_N3, lidar, COARSE_POINTS),
        ground_B3=_tensor(np.array([ground.a, ground.b, ground.c])),
        start_positions_BS3=_tensor(starts.position_S3),
        start_angles_BS=_tensor(starts.yaws_S),
    )


def stack(parts: Sequence[Observations]) -> Observations:
    """One batch of several objects, or of several batches."""
    return _stack(parts)


def _stack(parts: Sequence[Part]) -> Part:
    first = parts[0]
    joined: dict[str, Any] = {}
    for name, value in vars(first).items():
        values = [getattr(part, name) for part in parts]
        joined[name] = torch.cat(values) if isinstance(value, Tensor) else _stack(values)
    return type(first)(**joined)


def _tensor(array: Floats | NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None]


def _raster(
    owned: OwnedMask, box: Box, calibration: Calibration, rows: int, columns: int
) -> Raster:
    """Pixels evenly spread over the box and a margin, as far as the picture reaches."""
    height, width = owned.mask_HW.shape
    left, top, right, bottom = box
    aside, above = MARGIN * (right - left), MARGIN * (bottom - top)
    u = _spread(left - aside, right + aside, width, columns)
    v = _spread(top - above, bottom + above, height, rows)
    grid = np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2)
    _, rays = calibration.rays(grid)
    pixel = np.round(grid).astype(int)
    return Raster(
        directions_BP3=_tensor(rays / np.linalg.norm(rays, axis=1, keepdims=True)),
        mask_BP=_tensor(owned.mask_HW[pixel[:, 1], pixel[:, 0]]),
        weight_BP=_tensor(~owned.hidden_HW[pixel[:, 1], pixel[:, 0]]),
    )


def _spread(low: float, high: float, limit: int, count: int) -> Floats:
    low, high = max(low, 0.0), min(high, limit - 1.0)
    step = (high - low) / count
    return np.asarray(low + step * (np.arange(count) + 0.5), np.float64)


def _returns(points_N3: Floats, lidar_3: Floats, limit: int) -> Returns:
    """At most ``limit`` returns, evenly picked, padded to that number."""
    if len(points_N3) > limit:
        points_N3 = points_N3[np.linspace(0, len(points_N3) - 1, limit).round().astype(int)]
    count = len(points_N3)
    padded, towards = np.zeros((2, limit, 3))
    padded[:count] = points_N3
    back = lidar_3 - points_N3
    towards[:count] = back / np.linalg.norm(back, axis=1, keepdims=True)
    weight = np.zeros(limit)
    weight[:count] = 1 / max(count, 1)
    return Returns(_tensor(padded), _tensor(towards), _tensor(weight))
