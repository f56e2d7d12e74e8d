"""The voxels of the LiDAR frame that a fitted car fills, and the file they are written to."""

# N voxels

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.slf.prior import ShapePrior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.sdf import Pose, object_from_camera, sample
from gesso_core.errors import InvalidRequest

SMALLEST, LARGEST = 0.01, 1.0  # metres
_POINT: Final = np.dtype([("centre", "<f4", 3), ("object", "<u4")])


def occupied_voxels(
    car: FittedCar, prior: ShapePrior, calibration: Calibration, voxel: float = 0.2
) -> NDArray[np.int64]:
    """Indices (N, 3) of the filled voxels: index i covers [i, i + 1) * ``voxel`` metres of an axis.

    The grid is that of the velodyne frame (x forward, y left, z up) and the same for all cars, so
    that their voxels can be put together. A voxel is filled when its centre is inside the shape.

    Raises:
        InvalidRequest: a voxel below a centimetre, or above a metre.
    """
    if not SMALLEST <= voxel <= LARGEST:
        raise InvalidRequest(f"voxel is {voxel} m; use {SMALLEST:g} to {LARGEST:g}", field="voxel")
    surface = calibration.velo_from_rect(car.mesh.vertices_V3)
    low = np.floor(surface.min(axis=0) / voxel).astype(int)
    high = np.floor(surface.max(axis=0) / voxel).astype(int)
    across = [np.arange(a, b + 1) for a, b in zip(low[1:], high[1:], strict=True)]
    pose, grid = Pose.from_rows(torch.tensor([car.pose])), prior.grid(torch.tensor([car.code]))
    filled = []
    for ahead in range(low[0], high[0] + 1):  # slice by slice: a car has millions of centimetres
        index = np.stack(np.meshgrid([ahead], *across, indexing="ij"), axis=-1).reshape(-1, 3)
        centres = torch.from_numpy(calibration.rect_from_velo((index + 0.5) * voxel)).float()
        distance = sample(grid, object_from_camera(centres[None], pose))
        filled.append(index[distance[0].numpy() < 0])
    return np.concatenate(filled).astype(np.int64)


def occupancy_ply(
    cars: Sequence[FittedCar], prior: ShapePrior, calibration: Calibration, voxel: float = 0.2
) -> bytes:
    """The filled voxels of all cars as a binary little-endian PLY file of points.

    A point is the centre of a voxel in the LiDAR frame, as the scan's points are, with the number
    of the car's prompt as ``object``. A voxel that two cars fill is there twice.

    Raises InvalidRequest as `occupied_voxels` does.
    """
    rows = [np.zeros(0, _POINT)]
    for car in cars:
        filled = occupied_voxels(car, prior, calibration, voxel)
        points = np.zeros(len(filled), _POINT)
        points["centre"], points["object"] = (filled + 0.5) * voxel, car.index
        rows.append(points)
    whole = np.concatenate(rows)
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"comment centres of filled voxels of {voxel:g} m, LiDAR frame\n"
        f"element vertex {len(whole)}\n"
        "property float x\nproperty float y\nproperty float z\nproperty uint object\nend_header\n"
    )
    return header.encode("ascii") + whole.tobytes()
