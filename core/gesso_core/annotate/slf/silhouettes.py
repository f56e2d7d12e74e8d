"""The soft silhouette of a distance grid, differentiable in pose and shape.

    m(pixel) = sigmoid(-min over the pixel's ray of sdf / softness)

The place of the minimum is searched without gradients, on a few points and with a parabola through
the lowest three. Moving it changes nothing to first order, so one differentiable query per pixel
there gives the whole gradient.
"""

# B poses   P pixels   T points on a ray

from typing import Final

import torch
from torch import Tensor

from gesso_core.annotate.slf.sdf import (
    Grid,
    Pose,
    directions_to_object,
    object_from_camera,
    sample,
    sample_nearest,
)

SOFTNESS: Final = 0.06  # metres of distance over which a silhouette fades
REACH: Final = 3.0  # metres searched before and behind the object's centre
POINTS: Final = 13
_HALF_HEIGHT: Final = 0.75  # from the pose's origin, on the ground, to the middle of a car
_NEAREST: Final = 0.1  # metres in front of the camera


@torch.no_grad()
def closest_points(grid: Grid, pose: Pose, origin_B3: Tensor, directions_BP3: Tensor) -> Tensor:
    """Where each ray comes closest to the surface, or deepest into it: distance along it (B, P).

    Args:
        origin_B3: the camera's place.
        directions_BP3: unit vectors in the camera frame.
    """
    start = object_from_camera(origin_B3[:, None], pose)
    along = directions_to_object(directions_BP3, pose)
    middle = start.new_tensor([0.0, -_HALF_HEIGHT, 0.0]) - start
    offsets = torch.linspace(-REACH, REACH, POINTS, device=start.device)
    t_BPT = ((middle * along).sum(-1)[..., None] + offsets).clamp_min(_NEAREST)
    x, y, z = (start[..., i, None] + t_BPT * along[..., i, None] for i in range(3))
    lowest = sample_nearest(grid, (x, y, z)).argmin(dim=-1, keepdim=True)
    return _lowest_of_parabola(grid, start, along, t_BPT.gather(-1, lowest))


def _lowest_of_parabola(grid: Grid, start: Tensor, along: Tensor, t_BP1: Tensor) -> Tensor:
    """A better minimum than the searched ``t``, from three exact distances around it."""
    step = 2 * REACH / (POINTS - 1)
    t_BP3 = t_BP1 + t_BP1.new_tensor([-step, 0.0, step])
    points = start[:, :, None] + t_BP3[..., None] * along[:, :, None]
    before, here, after = sample(grid, points.flatten(1, 2)).view(t_BP3.shape).unbind(-1)
    bend = (before - 2 * here + after).clamp_min(1e-3)
    shift = ((before - after) / (2 * bend)).clamp(-1, 1) * step
    return (t_BP1[..., 0] + shift).clamp_min(_NEAREST)


def soft(distance: Tensor) -> Tensor:
    """Coverage of a pixel whose ray comes this close to the surface."""
    return torch.sigmoid(-distance / SOFTNESS)


def silhouette(grid: Grid, pose: Pose, origin_B3: Tensor, directions_BP3: Tensor) -> Tensor:
    """Soft coverage of each pixel, (B, P)."""
    t = closest_points(grid, pose, origin_B3, directions_BP3)
    points = origin_B3[:, None] + t[..., None] * directions_BP3
    return soft(sample(grid, object_from_camera(points, pose)))


def dice_error(silhouette_BP: Tensor, mask_BP: Tensor, weight_BP: Tensor) -> Tensor:
    """1 - Dice coefficient (B,) over pixels of weight above 0; both sides gain one pixel."""
    shared = (weight_BP * silhouette_BP * mask_BP).sum(-1)
    whole = (weight_BP * (silhouette_BP + mask_BP)).sum(-1)
    return 1 - (2 * shared + 1) / (whole + 1)
