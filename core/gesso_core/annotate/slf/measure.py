"""How well SLF does: overlaps per car, recalls, average precision, and what each part is worth.

Real frames are few, so they get recalls and a line per car, never AP40: with N objects even a
perfect detector reaches at most (N - 1) / 40 of it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from gesso_core.annotate.kitti.boxes import bev_iou, iou_3d, points_in_boxes
from gesso_core.annotate.kitti.dataset import KittiFrame, open_folder
from gesso_core.annotate.kitti.evaluation import evaluate as average_precision
from gesso_core.annotate.kitti.labels import KittiObject, boxes3d
from gesso_core.annotate.slf.fit import FitOptions
from gesso_core.annotate.slf.lift import FEW_POINTS
from gesso_core.annotate.slf.prior import ShapePrior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.scene import Outcome, Refused, Scene, SlfOptions, annotate_cars
from gesso_core.annotate.slf.stored import read_stored_masks
from gesso_core.annotate.slf.synthetic import synthetic_frames

CLASS: Final = "Car"
THRESHOLDS: Final = (0.5, 0.7)


@dataclass(frozen=True)
class Variant:
    """A way to run SLF; ``scan`` False hides the LiDAR altogether."""

    options: SlfOptions
    scan: bool = True


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "mask and LiDAR": Variant(SlfOptions()),
        "mask only": Variant(SlfOptions(fit=FitOptions(points=0.0, free_space=0.0))),
        "LiDAR only": Variant(SlfOptions(fit=FitOptions(mask=0.0))),
        "no overlap resolution": Variant(SlfOptions(resolve_overlaps=False)),
        "image only (no scan)": Variant(SlfOptions(), scan=False),
    }
)


@dataclass(frozen=True)
class Sample:
    """A scene with the truth about its objects, in the same order.

    Only those ``counted`` enter the means; the others are fitted all the same.
    """

    name: str
    scene: Scene
    truths: Sequence[KittiObject]
    counted: Sequence[bool]


@dataclass(frozen=True)
class CarScore:
    """How one car came out; a refused one has overlaps of 0 and no yaw error."""

    frame: str
    index: int
    counted: bool
    depth: float  # metres, true
    bev_iou: float
    iou_3d: float
    yaw_error: float | None  # radians, modulo half a turn
    reversed: bool | None
    size_error: tuple[float, float, float] | None  # height, width, length in metres
    score: float
    points: int
    flags: tuple[str, ...]
    refused: str = ""


@dataclass(frozen=True)
class Summary:
    """One line of the table; AP is None where there are too few objects for it."""

    variant: str
    cars: int
    bev_iou: float
    iou_3d: float
    recall_bev: tuple[float, float]  # at IoU 0.5 and 0.7
    recall_3d: tuple[float, float]
    yaw_error: float  # median, radians modulo half a turn
    heading_right: float  # share of those that are not flagged as ambiguous
    ap40_bev: float | None  # at IoU 0.5, moderate
    ap40_3d: float | None
    cpu_seconds: float


def real_samples(folder: Path, masks: Path) -> list[Sample]:
    """The cars of a KITTI folder that have stored masks, counted from 5 points on."""
    samples = [_real_sample(frame, masks) for frame in open_folder(folder)]
    return [sample for sample in samples if sample.truths]


def _real_sample(frame: KittiFrame, masks: Path) -> Sample:
    stored = read_stored_masks(masks / f"{frame.name}.json", frozenset({CLASS}))
    labels = frame.labels()
    truths = [labels[line] for line in stored]
    scene = Scene(frame.calibration(), list(stored.values()), frame.points())
    rect = scene.calibration.rect_from_velo(frame.points())
    inside = points_in_boxes(rect, boxes3d(truths)).sum(axis=0)
    return Sample(frame.name, scene, truths, [int(n) >= FEW_POINTS for n in inside])


def synthetic_samples(frames: int) -> list[Sample]:
    """The set this repository makes itself."""
    made = synthetic_frames(frames)
    return [Sample(f.name, f.scene, f.labels, [True] * len(f.labels)) for f in made]


def run_variant(
    samples: Sequence[Sample], prior: ShapePrior, variant: Variant
) -> tuple[list[list[Outcome]], float]:
    """Outcomes of each sample, and CPU seconds in all."""
    started = time.process_time()
    outcomes = []
    for sample in samples:
        points = sample.scene.points_velo_N4 if variant.scan else None
        scene = Scene(sample.scene.calibration, sample.scene.objects, points)
        outcomes.append(annotate_cars(scene, prior, variant.options))
    return outcomes, time.process_time() - started


def score_car(frame: str, truth: KittiObject, counted: bool, outcome: Outcome) -> CarScore:
    """Compare one outcome with the truth."""
    place = (frame, outcome.index, counted, truth.location[2])
    if isinstance(outcome, Refused):
        return CarScore(*place, 0.0, 0.0, None, None, None, 0.0, 0, (), outcome.reason)
    found = outcome.label
    turn = found.rotation_y - truth.rotation_y
    h, w, length = np.subtract(found.size, truth.size).tolist()
    return CarScore(
        *place,
        bev_iou=float(bev_iou([found.box3d], [truth.box3d])[0, 0]),
        iou_3d=float(iou_3d([found.box3d], [truth.box3d])[0, 0]),
        yaw_error=abs(math.asin(math.sin(turn))),
        reversed=math.cos(turn) < 0,
        size_error=(h, w, length),
        score=found.score or 0.0,
        points=outcome.points,
        flags=tuple(map(str, outcome.flags)),
    )


def summarize(
    name: str,
    samples: Sequence[Sample],
    outcomes: Sequence[Sequence[Outcome]],
    cpu_seconds: float,
    *,
    with_ap: bool,
) -> tuple[Summary, list[CarScore]]:
    """The table's line and the scores behind it."""
    cars = [
        score_car(sample.name, truth, counted, outcome)
        for sample, row in zip(samples, outcomes, strict=True)
        for truth, counted, outcome in zip(sample.truths, sample.counted, row, strict=True)
    ]
    asked = [car for car in cars if car.counted]
    bev, volume = (np.array([getattr(c, field) for c in asked]) for field in ("bev_iou", "iou_3d"))
    yaws = [c.yaw_error for c in asked if c.yaw_error is not None]
    sure = [c for c in asked if c.reversed is not None and "heading_ambiguous" not in c.flags]
    ap_bev, ap_3d = _precisions(samples, outcomes) if with_ap else (None, None)
    summary = Summary(
        variant=name,
        cars=len(asked),
        bev_iou=float(bev.mean()),
        iou_3d=float(volume.mean()),
        recall_bev=(float((bev > 0.5).mean()), float((bev > 0.7).mean())),
        recall_3d=(float((volume > 0.5).mean()), float((volume > 0.7).mean())),
        yaw_error=float(np.median(yaws)) if yaws else math.nan,
        heading_right=sum(not c.reversed for c in sure) / max(len(sure), 1),
        ap40_bev=ap_bev,
        ap40_3d=ap_3d,
        cpu_seconds=cpu_seconds,
    )
    return summary, cars


def _precisions(
    samples: Sequence[Sample], outcomes: Sequence[Sequence[Outcome]]
) -> tuple[float, float]:
    """AP40 at IoU 0.5 by KITTI's protocol, moderate: bird's-eye view and 3D."""
    truths = [list(sample.truths) for sample in samples]
    found = [[o.label for o in row if isinstance(o, FittedCar)] for row in outcomes]
    bev, volume = (
        average_precision(truths, found, kind=CLASS, metric=metric, min_overlap=0.5)[1].ap40
        for metric in ("bev", "3d")
    )
    return bev, volume


def table(summaries: Sequence[Summary]) -> str:
    """One line per variant."""
    lines = [
        f"{'variant':<24}{'cars':>5}{'BEV':>7}{'3D':>7}{'BEV>.5':>8}{'3D>.5':>7}{'BEV>.7':>8}"
        f"{'3D>.7':>7}{'yaw':>7}{'AP BEV':>8}{'AP 3D':>7}{'CPU s':>7}"
    ]
    for s in summaries:
        ap = [f"{a:.1f}" if a is not None else "-" for a in (s.ap40_bev, s.ap40_3d)]
        lines.append(
            f"{s.variant:<24}{s.cars:>5}{s.bev_iou:>7.3f}{s.iou_3d:>7.3f}"
            f"{s.recall_bev[0]:>8.3f}{s.recall_3d[0]:>7.3f}{s.recall_bev[1]:>8.3f}"
            f"{s.recall_3d[1]:>7.3f}{s.yaw_error:>7.3f}{ap[0]:>8}{ap[1]:>7}{s.cpu_seconds:>7.1f}"
        )
    return "\n".join(lines)


def car_lines(cars: Sequence[CarScore]) -> str:
    """One line per car: where, how good, and what was flagged."""
    return "\n".join(
        f"  {c.frame} #{c.index} {c.depth:5.1f} m  BEV {c.bev_iou:.2f}  3D {c.iou_3d:.2f}  "
        f"score {c.score:.2f}  {c.points} points  {c.refused or ' '.join(c.flags)}"
        for c in cars
    )


def failures(cars: Sequence[CarScore]) -> list[CarScore]:
    """Cars below an overlap of 0.5 in the bird's-eye view or in 3D."""
    return [car for car in cars if car.counted and min(car.bev_iou, car.iou_3d) <= THRESHOLDS[0]]
