"""The voxels of the LiDAR frame that a fitted car fills."""

# N voxels

import numpy as np
import torch
from numpy.typing import NDArray

from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.slf.prior import ShapePrior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.sdf import Pose, object_from_camera, sample
from gesso_core.errors import InvalidRequest


def occupied_voxels(
    car: FittedCar, prior: ShapePrior, calibration: Calibration, voxel: float = 0.2
) -> NDArray[np.int64]:
    """Indices (N, 3) of the filled voxels: index i covers [i, i + 1) * ``voxel`` metres of an axis.

    The grid is that of the velodyne frame (x forward, y left, z up) and the same for all cars, so
    that their voxels can be put together. A voxel is filled when its centre is inside the shape.

    Raises:
        InvalidRequest: a voxel below a centimetre, or above a metre.
    """
    if not 0.01 <= voxel <= 1.0:
        raise InvalidRequest(f"voxel is {voxel} m; use 0.01 to 1", field="voxel")
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
