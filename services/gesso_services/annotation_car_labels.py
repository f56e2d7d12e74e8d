"""Fitted cars as messages: what lies in the blob ``labels`` of a job."""

from collections.abc import Sequence

from gesso_contracts import annotations as a
from gesso_core.annotate.kitti.calibration import Calibration, format_calibration
from gesso_core.annotate.slf.drawings import picture_corners
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.scene import Outcome, SegmentedObject

from gesso_services.annotation_labels import Size, whole_code


def car_labels(
    size: Size,
    objects: Sequence[SegmentedObject],
    outcomes: Sequence[Outcome],
    calibration: Calibration,
) -> a.CarLabels:
    """All prompts of a frame as a message, with the calibration that says where they stand."""
    height, width = size
    return a.CarLabels(
        width=width,
        height=height,
        calibration=format_calibration(calibration),
        objects=[
            a.CarOutcome(
                index=outcome.index,
                mask=whole_code(item.mask_HW),
                car=_car(outcome, calibration) if isinstance(outcome, FittedCar) else None,
                refused=None if isinstance(outcome, FittedCar) else outcome.reason,
            )
            for item, outcome in zip(objects, outcomes, strict=True)
        ],
    )


def _car(fitted: FittedCar, calibration: Calibration) -> a.AnnotatedCar:
    label = fitted.label
    return a.AnnotatedCar(
        kind=label.kind,
        truncated=label.truncated,
        occluded=label.occluded,
        alpha=label.alpha,
        box=label.box2d,
        size=label.size,
        location=label.location,
        rotation_y=label.rotation_y,
        score=label.score or 0.0,
        points=fitted.points,
        flags=[str(flag) for flag in fitted.flags],
        energies=dict(fitted.energies),
        pose=fitted.pose,
        code=list(fitted.code),
        corners=picture_corners(label, calibration),
    )
