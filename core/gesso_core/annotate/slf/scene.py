"""Segment, lift and fit of one picture's cars, or of many pictures' in one batch.

Masks come in with their boxes: from a segmenter, or stored. One object that cannot be fitted never
stops the others: it comes back with the reason.
"""

# N points   H W picture

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Box, Floats
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.slf.fit import FitOptions, Fits, fit
from gesso_core.annotate.slf.ground import Ground, find_ground, ground_at
from gesso_core.annotate.slf.lift import object_points, points_in_mask, start_poses
from gesso_core.annotate.slf.observations import Observations, observe, stack
from gesso_core.annotate.slf.overlaps import OwnedMask, leave_alone, resolve
from gesso_core.annotate.slf.prior import ShapePrior, extent_of
from gesso_core.annotate.slf.results import HEADING_MARGIN, Evidence, Fitted, FittedCar, describe
from gesso_core.annotate.slf.sdf import Pose
from gesso_core.errors import InvalidRequest

DrivingSide = Literal["right", "left"]

_ALONG_THE_ROAD: Final = 0.5  # sine of the angle to crossing traffic
_OWN_LANE: Final = 2.0  # metres beside the camera that still belong to its own side of the road


@dataclass(frozen=True)
class SegmentedObject:
    """One prompt with the mask that came of it; the box in pixels (left, top, right, bottom)."""

    mask_HW: Mask
    box: Box
    predicted_iou: float = 1.0


@dataclass(frozen=True)
class Scene:
    """One picture: its camera, its masks and, unless only the picture is known, its LiDAR scan."""

    calibration: Calibration
    objects: Sequence[SegmentedObject]
    points_velo_N4: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Refused:
    """An object without a box, and why."""

    index: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SlfOptions:
    """What a user may choose."""

    fit: FitOptions = field(default_factory=FitOptions)
    resolve_overlaps: bool = True
    driving_side: DrivingSide | None = "right"  # decides headings that the energy leaves open


Outcome = FittedCar | Refused


@dataclass(frozen=True)
class _Lifted:
    """An object that is ready to be fitted."""

    index: int
    seen: Observations
    evidence: Evidence


def annotate_cars(
    scene: Scene, prior: ShapePrior, options: SlfOptions | None = None
) -> list[Outcome]:
    """A box and a shape for every object of the scene, in its order."""
    return annotate_scenes([scene], prior, options)[0]


def annotate_scenes(
    scenes: Sequence[Scene], prior: ShapePrior, options: SlfOptions | None = None
) -> list[list[Outcome]]:
    """`annotate_cars` of several scenes, all objects fitted in one batch."""
    options = options or SlfOptions()
    lifted = [_lift_scene(scene, prior, options) for scene in scenes]
    ready = [item for items in lifted for item in items if isinstance(item, _Lifted)]
    fitted = _fit(ready, prior, options)
    return [
        [
            _finish(item, next(fitted), scene, prior) if isinstance(item, _Lifted) else item
            for item in items
        ]
        for scene, items in zip(scenes, lifted, strict=True)
    ]


def _finish(item: _Lifted, fitted: Fitted | None, scene: Scene, prior: ShapePrior) -> Outcome:
    if fitted is None:
        return Refused(item.index, "the fit left the finite numbers")
    try:
        return describe(item.index, fitted, prior, scene.calibration, item.evidence)
    except InvalidRequest as error:
        return Refused(item.index, error.message)


def _lift_scene(scene: Scene, prior: ShapePrior, options: SlfOptions) -> list[_Lifted | Refused]:
    _check(scene)
    rect = np.zeros((0, 3))
    if scene.points_velo_N4 is not None:
        rect = scene.calibration.rect_from_velo(scene.points_velo_N4)
    ground = find_ground(rect)
    refused = _refusals(scene.objects)
    sound = [index for index in range(len(scene.objects)) if index not in refused]
    owned = _owned(scene, sound, rect, options.resolve_overlaps)
    lifted: dict[int, _Lifted | Refused] = {**refused}
    for index, mask in zip(sound, owned, strict=True):
        try:
            lifted[index] = _lift(index, mask, scene, rect, ground, prior)
        except InvalidRequest as error:
            lifted[index] = Refused(index, error.message)
    return [lifted[index] for index in range(len(scene.objects))]


def _refusals(objects: Sequence[SegmentedObject]) -> dict[int, Refused]:
    """The objects that cannot be used, by their place; they take no pixels from the others."""
    refused = {}
    for index, item in enumerate(objects):
        try:
            _check_object(item)
        except InvalidRequest as error:
            refused[index] = Refused(index, error.message)
    return refused


def _check(scene: Scene) -> None:
    shapes = {item.mask_HW.shape for item in scene.objects}
    if len(shapes) > 1:
        raise InvalidRequest(
            f"masks of one picture have one size, got {sorted(shapes)}", field="objects"
        )


def _owned(
    scene: Scene, sound: Sequence[int], rect_N3: Floats, resolve_overlaps: bool
) -> list[OwnedMask]:
    """The masks of the ``sound`` objects, each pixel given to one of them."""
    objects = [scene.objects[index] for index in sound]
    masks, boxes = [o.mask_HW for o in objects], [o.box for o in objects]
    if not resolve_overlaps:
        return leave_alone(masks)
    depths = []
    for mask in masks:
        inside = points_in_mask(rect_N3, mask, scene.calibration)
        depths.append(float(np.median(rect_N3[inside, 2])) if len(inside) else math.inf)
    return resolve(masks, boxes, depths)


def _lift(
    index: int, owned: OwnedMask, scene: Scene, rect_N3: Floats, ground: Ground, prior: ShapePrior
) -> _Lifted:
    item = scene.objects[index]
    if not owned.mask_HW.any():
        raise InvalidRequest(
            "nearer objects take every pixel of this mask; is the object prompted twice?",
            field="objects",
        )
    ground = _ground_below(ground, rect_N3, owned, scene.calibration)
    points = object_points(rect_N3, owned.mask_HW, scene.calibration, ground)
    usual = extent_of(prior.grid(torch.zeros(1, prior.components))).size
    starts = start_poses(owned.mask_HW, points, scene.calibration, ground, usual)
    seen = observe(owned, item.box, points, starts, scene.calibration, ground)
    evidence = Evidence(
        kind=prior.kind,
        predicted_iou=item.predicted_iou,
        points=len(points),
        has_scan=scene.points_velo_N4 is not None,
        ground_found=ground.found,
        covering_HW=owned.hidden_HW,
    )
    return _Lifted(index, seen, evidence)


def _ground_below(
    ground: Ground, rect_N3: Floats, owned: OwnedMask, calibration: Calibration
) -> Ground:
    inside = points_in_mask(rect_N3, owned.mask_HW, calibration)
    if not len(inside):
        return ground
    x, _, z = np.median(rect_N3[inside], axis=0).tolist()
    return ground_at(ground, rect_N3, x, z)


def _check_object(item: SegmentedObject) -> None:
    """What comes before the first colon is counted, so no numbers stand there."""
    if not item.mask_HW.any():
        raise InvalidRequest("the mask is empty: nothing was found here", field="objects")
    height, width = item.mask_HW.shape
    left, top, right, bottom = item.box
    if not all(map(math.isfinite, item.box)) or right - left < 1 or bottom - top < 1:
        raise InvalidRequest(
            f"box without area: {item.box} needs left < right and top < bottom, at least a pixel",
            field="box",
        )
    if right <= 0 or bottom <= 0 or left >= width - 1 or top >= height - 1:
        raise InvalidRequest(
            f"box beside the picture: {item.box} in {width} x {height} pixels", field="box"
        )


def _fit(
    lifted: Sequence[_Lifted], prior: ShapePrior, options: SlfOptions
) -> Iterator[Fitted | None]:
    """One row per object, facing the way that the energy or else the driving side says.

    None stands for a fit that left the finite numbers.
    """
    if not lifted:
        return
    best, reverse = fit(stack([item.seen for item in lifted]), prior, options.fit)
    for i in range(len(lifted)):
        margin = float(reverse.total_B[i] - best.total_B[i])
        x, angle = float(best.pose.position_B3[i, 0]), float(best.pose.angle_B[i])
        turn = margin < HEADING_MARGIN and _faces_wrong_way(x, angle, options.driving_side)
        yield _row(reverse if turn else best, i, -margin if turn else margin)


def _faces_wrong_way(x: float, angle: float, side: DrivingSide | None) -> bool:
    """Whether a car at this x, heading along the road, would drive against the traffic."""
    away = -math.sin(angle)  # share of the heading that leads away from the camera
    if side is None or abs(away) < _ALONG_THE_ROAD:
        return False
    same_way = x > -_OWN_LANE if side == "right" else x < _OWN_LANE
    return (away > 0) != same_way


def _row(fits: Fits, i: int, margin: float) -> Fitted | None:
    rows = (*fits.pose, fits.code_BK, *fits.energies)
    if not all(bool(torch.isfinite(part[i]).all()) for part in rows):
        return None
    return Fitted(
        pose=Pose(*(part[i : i + 1] for part in fits.pose)),
        code_1K=fits.code_BK[i : i + 1],
        energies={name: float(term[i]) for name, term in fits.energies._asdict().items()},
        heading_margin=margin,
    )
