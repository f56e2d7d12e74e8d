"""From fitted pose and shape to a label line, a score and what a reviewer should look at."""

# V vertices   P pixels

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import torch

from gesso_core.annotate.geometry import Box, Floats
from gesso_core.annotate.kitti.boxes import observation_angle, wrap_angle
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.slf.meshes import Mesh, mesh_of
from gesso_core.annotate.slf.prior import ShapePrior, extent_of
from gesso_core.annotate.slf.sdf import Pose, camera_from_object
from gesso_core.annotate.slf.silhouettes import silhouette
from gesso_core.errors import InvalidRequest

_NEAREST: Final = 0.1  # metres: what lies nearer to the camera cannot be projected
_OCCLUDED, _LARGELY = 0.1, 0.5
_TRUNCATED: Final = 0.15
_SURE: Final = 0.5  # scores below ask for review
_FEW_POINTS: Final = 10  # fewer ask for review
_ALL_POINTS: Final = 30  # from here on more points do not raise the score
_NO_POINTS_FACTOR: Final = 0.3
_RENDERED = (24, 48)  # pixels of the silhouette that occlusion is counted on
HEADING_MARGIN: Final = 0.02  # energies closer than this leave front and back open


class Flag(StrEnum):
    """Why a person should look at a box."""

    HEADING_AMBIGUOUS = "heading_ambiguous"  # may face the other way
    IMAGE_ONLY = "image_only"  # no scan was given: depth is a guess from the mask's height
    NO_LIDAR = "no_lidar"  # there is a scan, but no point of it on the object
    FEW_POINTS = "few_points"
    NO_GROUND = "no_ground"  # a level road was assumed
    TRUNCATED = "truncated"
    OCCLUDED = "occluded"
    LOW_SCORE = "low_score"


@dataclass(frozen=True)
class FittedCar:
    """One object's box, shape and the numbers that led to them."""

    index: int  # of the prompt
    label: KittiObject  # 16 columns, unrounded
    mesh: Mesh  # rectified camera frame
    pose: tuple[float, float, float, float]  # x, y, z, rotation_y of the shape's own frame
    code: tuple[float, ...]
    energies: dict[str, float]
    points: int
    flags: tuple[Flag, ...]
    heading_margin: float  # energy of the reversed fit minus this one's
    prior_sha256: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of an object besides its fit."""

    kind: str
    predicted_iou: float  # of the mask, as the segmenter says
    points: int
    has_scan: bool
    ground_found: bool
    covering_HW: Mask  # pixels of other, nearer objects


@dataclass(frozen=True)
class Fitted:
    """One row of a fit."""

    pose: Pose  # of one row
    code_1K: torch.Tensor
    energies: dict[str, float]
    heading_margin: float


def describe(
    index: int, fitted: Fitted, prior: ShapePrior, calibration: Calibration, evidence: Evidence
) -> FittedCar:
    """All columns of the label, score and flags.

    Raises InvalidRequest for a shape that is empty, or wholly behind the camera.
    """
    grid = prior.grid(fitted.code_1K)
    extent = extent_of(grid)
    bottom = fitted.code_1K.new_tensor([[[(extent.rear + extent.front) / 2, extent.bottom, 0.0]]])
    x, y, z = camera_from_object(bottom, fitted.pose)[0, 0].tolist()
    angle = float(wrap_angle(float(fitted.pose.angle_B)))
    mesh = mesh_of(grid).posed(fitted.pose)
    whole, clipped = picture_boxes(mesh, calibration, evidence.covering_HW.shape)
    truncated = 1 - _area(clipped) / max(_area(whole), 1e-9)
    hidden = covered_share(fitted, prior, calibration, clipped, evidence.covering_HW)
    occluded = sum(hidden >= limit for limit in (_OCCLUDED, _LARGELY))
    score = score_of(fitted.energies, evidence)
    box = (*extent.size, x, y, z, angle)
    label = KittiObject(
        kind=evidence.kind,
        truncated=min(max(truncated, 0.0), 1.0),
        occluded=occluded,
        alpha=float(observation_angle(box)[0]),
        box2d=clipped,
        size=extent.size,
        location=(x, y, z),
        rotation_y=angle,
        score=score,
    )
    return FittedCar(
        index=index,
        label=label,
        mesh=mesh,
        pose=(*fitted.pose.position_B3[0].tolist(), angle),
        code=tuple(fitted.code_1K[0].tolist()),
        energies=fitted.energies,
        points=evidence.points,
        flags=_flags(label, fitted, evidence),
        heading_margin=fitted.heading_margin,
        prior_sha256=prior.sha256,
    )


def score_of(energies: dict[str, float], evidence: Evidence) -> float:
    """Trust in 0..1: how well mask and points are met, and how much there was to meet."""
    seen = min(1.0, evidence.points / _ALL_POINTS) ** 0.25 if evidence.points else _NO_POINTS_FACTOR
    fits = (1 - energies["mask"]) * math.exp(-2 * energies["points"])
    return min(max(fits * seen * min(evidence.predicted_iou, 1.0), 0.0), 1.0)


def _flags(label: KittiObject, fitted: Fitted, evidence: Evidence) -> tuple[Flag, ...]:
    wanted = {
        Flag.HEADING_AMBIGUOUS: abs(fitted.heading_margin) < HEADING_MARGIN,
        Flag.IMAGE_ONLY: not evidence.has_scan,
        Flag.NO_LIDAR: evidence.has_scan and not evidence.points,
        Flag.FEW_POINTS: 0 < evidence.points < _FEW_POINTS,
        Flag.NO_GROUND: not evidence.ground_found,
        Flag.TRUNCATED: label.truncated > _TRUNCATED,
        Flag.OCCLUDED: label.occluded > 0,
        Flag.LOW_SCORE: (label.score or 0.0) < _SURE,
    }
    return tuple(flag for flag, holds in wanted.items() if holds)


def picture_boxes(
    mesh: Mesh, calibration: Calibration, shape_HW: tuple[int, ...]
) -> tuple[Box, Box]:
    """Box around the projected shape, and the part of it inside the picture."""
    points = mesh.vertices_V3[mesh.vertices_V3[:, 2] > _NEAREST]
    if not len(points):
        raise InvalidRequest(
            "the fitted shape is not in front of the camera; prompt another object",
            field="objects",
        )
    uv, _ = calibration.project(points)
    low, high = uv.min(axis=0), uv.max(axis=0)
    last = np.array([shape_HW[1] - 1, shape_HW[0] - 1])
    inside_low, inside_high = np.clip(low, 0, last), np.clip(high, 0, last)
    return _box(low, high), _box(inside_low, inside_high)


def _box(low_2: Floats, high_2: Floats) -> Box:
    return float(low_2[0]), float(low_2[1]), float(high_2[0]), float(high_2[1])


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def covered_share(
    fitted: Fitted, prior: ShapePrior, calibration: Calibration, box: Box, covering_HW: Mask
) -> float:
    """Share of the rendered shape that nearer objects' masks cover."""
    rows, columns = _RENDERED
    v, u = np.linspace(box[1], box[3], rows), np.linspace(box[0], box[2], columns)
    pixels = np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2)
    origin, rays = calibration.rays(pixels)
    unit = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    start, directions = (torch.from_numpy(a).float()[None] for a in (origin, unit))
    with torch.no_grad():
        drawn = silhouette(prior.grid(fitted.code_1K), fitted.pose, start, directions)[0] > 0.5
    at = pixels[drawn.numpy()].round().astype(int)
    return float(covering_HW[at[:, 1], at[:, 0]].mean()) if len(at) else 0.0
