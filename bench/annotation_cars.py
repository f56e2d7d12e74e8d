"""SLF: eight cars in one batch against one by one, on made frames that the prior never saw.

Masks are given, so this is lifting and fitting alone. Masks that overlap are left as they are: who
comes alone has nobody to share pixels with, and both ways must find the same boxes.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from cpu_timing import Row, in_turn
from gesso_core.annotate.kitti.boxes import bev_iou, iou_3d
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.slf.prior import ShapePrior, load_prior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.scene import Outcome, Scene, SlfOptions, annotate_cars, annotate_scenes
from gesso_core.annotate.slf.synthetic import synthetic_frames

CARS, PER_FRAME = 8, 4
OPTIONS = SlfOptions(resolve_overlaps=False)
BATCH_TARGET, SECONDS = 3.0, 10.0
CORES = 2


def car_rows(*, smoke: bool) -> Iterator[Row]:
    prior = load_prior()
    frames, scenes, truths = _cars(2 if smoke else CARS)
    repeats = 1 if smoke else 11

    def together() -> list[Outcome]:
        return [car for cars in annotate_scenes(frames, prior, OPTIONS) for car in cars]

    def alone() -> list[Outcome]:
        return [annotate_cars(scene, prior, OPTIONS)[0] for scene in scenes]

    times = in_turn({"one by one": alone, "together": together}, repeats)
    count = len(truths)
    one_ms = times["one by one"].cpu_ms / count
    ratio = times["together"].cpu_ms / one_ms
    yield {
        "what": "cars in one batch against one car",
        "cars": count,
        **{name: taken.row() for name, taken in times.items()},
        "one_cpu_ms": round(one_ms, 3),
        "ratio": round(ratio, 3),
        "target": BATCH_TARGET,
        "met": ratio <= BATCH_TARGET,
        "one_by_one_over_together": round(count / ratio, 3),
        **_quality(together(), truths),
        "largest_difference_m": _largest_difference(alone(), together()),
    }
    yield _on_two_cores(scenes, prior)


def _cars(count: int) -> tuple[list[Scene], list[Scene], list[KittiObject]]:
    """Some cars of one frame after the other: as frames, each alone, and the truth."""
    frames: list[Scene] = []
    scenes: list[Scene] = []
    truths: list[KittiObject] = []
    for frame in synthetic_frames(count):
        taken = min(PER_FRAME, count - len(truths))
        cars = frame.scene.objects[:taken]
        calibration, scan = frame.scene.calibration, frame.scene.points_velo_N4
        frames.append(Scene(calibration, cars, scan))
        scenes.extend(Scene(calibration, [car], scan) for car in cars)
        truths.extend(frame.labels[:taken])
        if len(truths) == count:
            break
    return frames, scenes, truths


def _on_two_cores(scenes: Sequence[Scene], prior: ShapePrior) -> Row:
    """Seconds an object takes when it comes alone, which is when it takes longest."""
    before, cpu, seconds = torch.get_num_threads(), time.process_time(), []
    torch.set_num_threads(min(CORES, os.cpu_count() or 1))
    try:
        for scene in scenes:
            begun = time.perf_counter()
            annotate_cars(scene, prior, OPTIONS)
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return {
        "what": "a car alone, two threads",
        "cpu_s": round((time.process_time() - cpu) / len(scenes), 3),
        "wall_s": round(statistics.median(seconds), 3),
        "worst_wall_s": round(max(seconds), 3),
        "target": SECONDS,
        "met": max(seconds) < SECONDS,
    }


def _quality(outcomes: Sequence[Outcome], truths: Sequence[KittiObject]) -> Row:
    overlaps = np.zeros((len(truths), 2))  # a refused car has none
    for row, (outcome, truth) in enumerate(zip(outcomes, truths, strict=True)):
        if isinstance(outcome, FittedCar):
            pair = [outcome.label.box3d], [truth.box3d]
            overlaps[row] = bev_iou(*pair)[0, 0], iou_3d(*pair)[0, 0]
    bev, volume = overlaps.mean(axis=0).tolist()
    return {"bev_iou": round(bev, 4), "iou_3d": round(volume, 4)}


def _largest_difference(first: Sequence[Outcome], second: Sequence[Outcome]) -> float:
    """Of sizes and places, in metres; a car that only one way refuses is an error."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        if isinstance(one, FittedCar) and isinstance(other, FittedCar):
            difference = np.abs(np.subtract(one.label.box3d[:6], other.label.box3d[:6]))
            largest = max(largest, float(difference.max()))
        elif type(one) is not type(other):
            raise SystemExit(f"fitted by one way only: {one}, {other}")
    return round(largest, 6)
