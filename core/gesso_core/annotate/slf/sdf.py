"""Signed distance grids and the poses that place them in front of a camera.

A grid lives in its object's own frame: x along the length (front at +x), y down with 0 on the
ground, z across. Distances are metres, negative inside.
"""

# B poses   P points   X Y Z grid nodes

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CORNERS = tuple((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1))


class Pose(NamedTuple):
    """Where objects stand: origin (B, 3) in the rectified camera frame and rotation_y (B,)."""

    position_B3: Tensor
    angle_B: Tensor

    @classmethod
    def from_rows(cls, rows_B4: Tensor) -> "Pose":
        """From rows of (x, y, z, rotation_y)."""
        return cls(rows_B4[:, :3], rows_B4[:, 3])


def object_from_camera(points_BP3: Tensor, pose: Pose) -> Tensor:
    """Points of the camera frame in each object's own frame."""
    return directions_to_object(points_BP3 - pose.position_B3[:, None], pose)


def directions_to_object(directions_BP3: Tensor, pose: Pose) -> Tensor:
    """R_y(angle)^T of each direction."""
    c, s = pose.angle_B.cos()[:, None], pose.angle_B.sin()[:, None]
    x, y, z = directions_BP3.unbind(-1)
    return torch.stack([c * x - s * z, y.expand_as(x), s * x + c * z], dim=-1)


def camera_from_object(points_BP3: Tensor, pose: Pose) -> Tensor:
    """The inverse of `object_from_camera`."""
    c, s = pose.angle_B.cos()[:, None], pose.angle_B.sin()[:, None]
    x, y, z = points_BP3.unbind(-1)
    return torch.stack([c * x + s * z, y, c * z - s * x], dim=-1) + pose.position_B3[:, None]


@dataclass(frozen=True)
class Grid:
    """Distances at the nodes of a grid: one for all poses (X, Y, Z), or one per pose (B, X, Y, Z).

    ``origin_3`` is the position of node [0, 0, 0]. A mirrored grid holds z >= 0 only and starts at
    z = 0; the other half is its reflection.
    """

    values: Tensor
    origin_3: Tensor
    voxel: float
    mirrored: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        """Nodes along x, y and z."""
        x, y, z = self.values.shape[-3:]
        return x, y, z


def sample(grid: Grid, points_BP3: Tensor) -> Tensor:
    """Trilinear distance (B, P) at points of the object frame.

    Beyond the grid it is the distance at the nearest border point plus the way to there.
    Differentiable in the points and in the grid's values.
    """
    _, size_y, size_z = grid.size
    nodes = _node_axes(grid, *points_BP3.unbind(-1))
    inside = [n.clamp(0, last - 1) for n, last in zip(nodes, grid.size, strict=True)]
    base = [
        n.detach().floor().clamp_max(last - 2) for n, last in zip(inside, grid.size, strict=True)
    ]
    index = _whole((base[0] * size_y + base[1]) * size_z + base[2])
    steps = torch.tensor([(i * size_y + j) * size_z + k for i, j, k in _CORNERS])
    corners = _gather(grid.values, index[..., None] + steps.to(index.device))
    for whole, low in zip(inside, base, strict=True):  # folds one axis: 8 -> 4 -> 2 -> 1 values
        first, second = corners.chunk(2, dim=-1)
        corners = torch.lerp(first, second, (whole - low)[..., None])
    beyond = sum((n - i).square() for n, i in zip(nodes, inside, strict=True))
    # The bound keeps the square root's slope finite where a point lies inside.
    return corners[..., 0] + torch.as_tensor(beyond).clamp_min(1e-12).sqrt() * grid.voxel


@torch.no_grad()
def sample_nearest(grid: Grid, points_xyz: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Distance at the nearest node of the grid, or of its border; much faster than `sample`.

    Coordinates are separate tensors (B, ...) in the object frame.
    """
    _, size_y, size_z = grid.size
    x, y, z = (
        n.round_().clamp_(0, last - 1)
        for n, last in zip(_node_axes(grid, *points_xyz), grid.size, strict=True)
    )
    return _gather(grid.values, _whole(x.mul_(size_y).add_(y).mul_(size_z).add_(z)))


def _node_axes(grid: Grid, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    origin_x, origin_y, origin_z = grid.origin_3.tolist()
    z = z.abs() if grid.mirrored else z
    return (x - origin_x) / grid.voxel, (y - origin_y) / grid.voxel, (z - origin_z) / grid.voxel


def _whole(index: Tensor) -> Tensor:
    """An index into the nodes; that of a point that is no number is 0, and `sample` answers NaN."""
    return index.nan_to_num_(0.0).long()


def _gather(values: Tensor, index: Tensor) -> Tensor:
    if values.ndim == 3:
        return values.reshape(-1)[index]
    flat = values.reshape(len(values), -1)
    return flat.gather(1, index.flatten(1)).view(index.shape)
