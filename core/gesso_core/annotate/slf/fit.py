"""Gradient descent on pose and shape, batched over objects and start poses.

    E = mask + points + free space + ground + 0.02 mean(code^2)

All start poses of all objects descend together: they do not touch each other. The best two
headings go on, each beside its reversal, and then the better of the two with more pixels.
"""

# B objects   S start poses   R rows = objects times poses   P pixels   N points   K shape code

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_core.annotate.slf.observations import Observations, Raster, Returns
from gesso_core.annotate.slf.prior import ShapePrior
from gesso_core.annotate.slf.sdf import Pose, object_from_camera, sample
from gesso_core.annotate.slf.silhouettes import closest_points, dice_error, soft

FREE_SPACE: Final = (0.3, 0.6)  # metres before a return where nothing may stand
FREE_EVERY: Final = 4  # of the returns so many are asked once
CODE_LIMIT: Final = 3.0
REFRESH: Final = 3  # steps between two searches for the closest points of the rays
_OTHER_HEADING: Final = 0.8  # radians, modulo half a turn, between the two that go on


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Weights of the energy and lengths of the descent."""

    mask: float = 1.0
    points: float = 2.0
    free_space: float = 1.0
    ground: float = 1.0
    shape: float = 0.02
    huber: float = 0.15  # metres
    components: int = 8  # of the prior that are fitted
    coarse_steps: int = 30
    coarse_pose_rate: float = 0.06
    coarse_shape_rate: float = 0.15
    fine_steps: int = 30  # of the two best headings, both ways round
    last_steps: int = 40  # of the better heading, both ways round
    fine_pose_rate: float = 0.03
    fine_shape_rate: float = 0.1


class Energies(NamedTuple):
    """Terms of the energy per row, unweighted."""

    mask: Tensor  # 1 - Dice coefficient
    points: Tensor  # mean Huber error of the distance at the returns, over its knee
    free_space: Tensor  # metres that the shape reaches before the returns
    ground: Tensor  # square metres: height above the ground, squared
    shape: Tensor  # mean square of the code

    def total(self, options: FitOptions) -> Tensor:
        """The weighted sum, (R,)."""
        return (
            options.mask * self.mask
            + options.points * self.points
            + options.free_space * self.free_space
            + options.ground * self.ground
            + options.shape * self.shape
        )


class _View(NamedTuple):
    """What each row is compared with."""

    origin_R3: Tensor
    raster: Raster
    returns: Returns
    ground_R3: Tensor


class _Rows(NamedTuple):
    """What descends."""

    position_R3: Tensor
    angle_R: Tensor
    code_RK: Tensor

    @property
    def pose(self) -> Pose:
        return Pose(self.position_R3, self.angle_R)

    def take(self, rows: Tensor) -> "_Rows":
        return _Rows(*(part[rows] for part in self))


class Fits(NamedTuple):
    """One fitted pose and shape per object."""

    pose: Pose
    code_BK: Tensor
    energies: Energies
    total_B: Tensor


def fit(
    seen: Observations, prior: ShapePrior, options: FitOptions | None = None
) -> tuple[Fits, Fits]:
    """Fit every object of the batch: the lowest energies, and the same cars facing the other way.

    The result for one object does not depend on the others.
    """
    options = options or FitOptions()
    objects, starts = seen.start_angles_BS.shape
    index = torch.arange(objects, device=seen.origin_B3.device)
    view = _view(seen, seen.coarse, seen.coarse_returns, index.repeat_interleave(starts))
    rows = _Rows(
        seen.start_positions_BS3.flatten(0, 1),
        seen.start_angles_BS.flatten(),
        seen.origin_B3.new_zeros(objects * starts, min(options.components, prior.components)),
    )
    rates = (options.coarse_pose_rate, options.coarse_shape_rate)
    rows, energies = _descend(rows, view, prior, options, options.coarse_steps, rates)
    totals_BS = energies.total(options).view(objects, starts)
    chosen_B2 = _two_headings(totals_BS, rows.angle_R.view(objects, starts))
    rows = _with_reversals(rows.take(chosen_B2.flatten()))
    view = _view(seen, seen.coarse, seen.coarse_returns, index.repeat_interleave(4))
    rates = (options.fine_pose_rate, options.fine_shape_rate)
    rows, energies = _descend(rows, view, prior, options, options.fine_steps, rates)
    rows = rows.take(_best_pair(energies.total(options).view(objects, 4)))
    view = _view(seen, seen.fine, seen.returns, index.repeat_interleave(2))
    rows, energies = _descend(rows, view, prior, options, options.last_steps, rates)
    return _lowest(rows, energies, options)


def _view(seen: Observations, raster: Raster, returns: Returns, index_R: Tensor) -> _View:
    return _View(
        seen.origin_B3[index_R],
        Raster(*(part[index_R] for part in vars(raster).values())),
        Returns(*(part[index_R] for part in vars(returns).values())),
        seen.ground_B3[index_R],
    )


def _descend(
    rows: _Rows,
    view: _View,
    prior: ShapePrior,
    options: FitOptions,
    steps: int,
    rates: tuple[float, float],
) -> tuple[_Rows, Energies]:
    """Adam on all rows at once; returns where they ended and the energies there."""
    rows = _Rows(*(part.detach().clone().requires_grad_() for part in rows))
    pose, shape = rates
    optimizer = torch.optim.Adam(
        [{"params": rows[:2], "lr": pose}, {"params": rows[2:], "lr": shape}], foreach=False
    )
    for step in range(steps):
        if step % REFRESH == 0:
            t_RP = _closest(rows, view, prior)
        optimizer.zero_grad()
        # Rows are independent, so the gradient of the sum is each row's own gradient.
        torch.autograd.backward(_energies(rows, t_RP, view, prior, options).total(options).sum())
        optimizer.step()
        with torch.no_grad():
            rows.code_RK.clamp_(-CODE_LIMIT, CODE_LIMIT)
    with torch.no_grad():
        t_RP = _closest(rows, view, prior)
        ended = _energies(rows, t_RP, view, prior, options)
    return _Rows(*(part.detach() for part in rows)), ended


@torch.no_grad()
def _closest(rows: _Rows, view: _View, prior: ShapePrior) -> Tensor:
    grid = prior.grid(rows.code_RK)
    return closest_points(grid, rows.pose, view.origin_R3, view.raster.directions_BP3)


def _energies(
    rows: _Rows, t_RP: Tensor, view: _View, prior: ShapePrior, options: FitOptions
) -> Energies:
    """Energies with the silhouette taken at these places of the rays."""
    grid, pose = prior.grid(rows.code_RK), rows.pose
    on_rays = view.origin_R3[:, None] + t_RP[..., None] * view.raster.directions_BP3
    points, back = view.returns.points_BN3, view.returns.towards_lidar_BN3
    few, before = points[:, ::FREE_EVERY], back[:, ::FREE_EVERY]
    asked = torch.cat([on_rays, points, *(few + d * before for d in FREE_SPACE)], dim=1)
    distance = sample(grid, object_from_camera(asked, pose))
    sizes = [t_RP.shape[1], points.shape[1], *(few.shape[1] for _ in FREE_SPACE)]
    rays, surface, *free = torch.split(distance, sizes, dim=1)
    near = F.huber_loss(surface, torch.zeros_like(surface), reduction="none", delta=options.huber)
    weight = view.returns.weight_BN
    few_weight = weight[:, ::FREE_EVERY]
    intrusion = torch.stack([F.relu(-d) for d in free]).mean(dim=0)
    x, y, z = rows.position_R3.unbind(-1)
    a, b, c = view.ground_R3.unbind(-1)
    return Energies(
        mask=dice_error(soft(rays), view.raster.mask_BP, view.raster.weight_BP),
        points=(weight * near).sum(-1) / options.huber,
        free_space=(few_weight * intrusion).sum(-1) / few_weight.sum(-1).clamp_min(1e-9),
        ground=(y - (a * x + b * z + c)).square(),
        shape=rows.code_RK.square().mean(-1),
    )


def _two_headings(totals_BS: Tensor, angles_BS: Tensor) -> Tensor:
    """Rows (B, 2) of the best start and of the best that ended at another heading."""
    best_B1 = totals_BS.argmin(dim=1, keepdim=True)
    turn = angles_BS - angles_BS.gather(1, best_B1)
    # |sin| is the same for a heading and its reversal; the best row itself is never second.
    alike = turn.sin().abs() < math.sin(_OTHER_HEADING)
    second_B1 = totals_BS.masked_fill(alike, math.inf).argmin(dim=1, keepdim=True)
    lonely = alike.all(dim=1, keepdim=True)
    others = totals_BS.scatter(1, best_B1, math.inf).argmin(dim=1, keepdim=True)
    first_B1 = torch.arange(len(best_B1), device=best_B1.device)[:, None] * totals_BS.shape[1]
    return first_B1 + torch.cat([best_B1, torch.where(lonely, others, second_B1)], dim=1)


def _with_reversals(rows: _Rows) -> _Rows:
    """Each row, followed by the same car turned round."""
    twice = rows.take(torch.arange(len(rows.angle_R)).repeat_interleave(2))
    turn = twice.angle_R.new_tensor([0.0, math.pi]).repeat(len(rows.angle_R))
    return twice._replace(angle_R=twice.angle_R + turn)


def _best_pair(totals_B4: Tensor) -> Tensor:
    """Rows of the best of four and of its reversal, (2 B)."""
    pair_B = totals_B4.argmin(dim=1) // 2
    first_B = 4 * torch.arange(len(pair_B), device=pair_B.device) + 2 * pair_B
    return torch.stack([first_B, first_B + 1], dim=1).flatten()


def _lowest(rows: _Rows, energies: Energies, options: FitOptions) -> tuple[Fits, Fits]:
    totals_B2 = energies.total(options).view(-1, 2)
    best_B = totals_B2.argmin(dim=1)
    pairs = 2 * torch.arange(len(best_B), device=best_B.device)

    def chosen(index: Tensor) -> Fits:
        taken = rows.take(index)
        terms = Energies(*(term[index] for term in energies))
        return Fits(taken.pose, taken.code_RK, terms, totals_B2.flatten()[index])

    return chosen(pairs + best_B), chosen(pairs + 1 - best_B)
