"""Jobs of the kind ``annotate-cars``: masks a few at a time, then all cars fitted in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gesso_contracts import annotations as a
from gesso_contracts.blobs import BlobRef
from gesso_core.annotate.kitti.calibration import Calibration, parse_calibration
from gesso_core.annotate.kitti.dataset import parse_points
from gesso_core.annotate.kitti.labels import KittiObject, format_labels
from gesso_core.annotate.segmenter.contract import OBJECT, Prompt, Segmenter
from gesso_core.annotate.slf.drawings import birds_eye, one_mesh, picture_overlay
from gesso_core.annotate.slf.meshes import glb_bytes
from gesso_core.annotate.slf.occupancy import occupancy_ply
from gesso_core.annotate.slf.prior import ShapePrior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.scene import (
    Outcome,
    Refused,
    Scene,
    SegmentedObject,
    SlfOptions,
    annotate_cars,
)
from gesso_core.annotate.slf.segment import segment
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, encode_picture
from numpy.typing import NDArray

from gesso_services.annotation_car_labels import car_labels
from gesso_services.annotation_labels import counted
from gesso_services.annotation_text import JSON
from gesso_services.annotation_workshop import CARS, Workshop
from gesso_services.runtime.job_context import JobContext

AT_ONCE = 8  # prompts whose masks are in memory together
GLB = "model/gltf-binary"
PLY = "application/octet-stream"  # there is no registered type


@dataclass(frozen=True)
class Frame:
    """One frame as it is worked on."""

    picture: Pixels
    calibration: Calibration
    points: NDArray[np.float32] | None


@dataclass(frozen=True)
class Wanted:
    """Which files a job shall make beside the labels: the shapes, and voxels of that size."""

    meshes: bool
    occupancy: float | None


@dataclass(frozen=True)
class Files:
    """What a finished job lays down."""

    labels: bytes
    overlay: bytes
    birds_eye: bytes
    meshes: bytes | None
    occupancy: bytes | None


class CarAnnotation:
    """The handler; everything heavy runs in a thread of the jobs."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    async def annotate(self, request: a.AnnotateCars, job: JobContext) -> a.CarsAnnotated:
        """A box in space for every prompt, or the reason why there is none."""
        shop = self.workshop
        shop.check_model(request.model, CARS)
        calibration = parse_calibration(request.calibration)
        scan = None if request.points is None else await shop.blobs.read(request.points)
        points = None if scan is None else parse_points(scan)
        frame = Frame(await shop.opened(request.image), calibration, points)
        objects, outcomes = await shop.for_job(self._annotate, frame, request, job)
        wanted = Wanted(request.meshes, request.occupancy)
        files = await shop.for_job(written, frame, objects, outcomes, shop.prior, wanted)
        cars = [outcome for outcome in outcomes if isinstance(outcome, FittedCar)]
        height, width = frame.picture.shape[:2]
        png, blobs = MEDIA_TYPES["png"], shop.blobs
        return a.CarsAnnotated(
            width=width,
            height=height,
            name=request.name,
            image=await blobs.laid_down(request.image),
            labels=await blobs.put(files.labels, JSON),
            kitti=format_labels(car.label for car in cars),
            overlay=await blobs.put(files.overlay, png),
            birds_eye=await blobs.put(files.birds_eye, png),
            meshes=await self._laid_down(files.meshes, GLB),
            occupancy=await self._laid_down(files.occupancy, PLY),
            cars=len(cars),
            refused=counted(one.reason for one in outcomes if isinstance(one, Refused)),
            flagged=counted(str(flag) for car in cars for flag in car.flags),
            provenance=shop.provenance(CARS),
        )

    async def _laid_down(self, data: bytes | None, media_type: str) -> BlobRef | None:
        return None if data is None else await self.workshop.blobs.put(data, media_type)

    def _annotate(
        self, frame: Frame, request: a.AnnotateCars, job: JobContext
    ) -> tuple[list[SegmentedObject], list[Outcome]]:
        prompts = [car_prompt(prompt) for prompt in request.prompts]
        options = SlfOptions(driving_side=request.driving_side)
        shop = self.workshop
        return annotate_frame(shop.segmenter(), frame, prompts, shop.prior, options, job.report)


def car_prompt(prompt: a.CarPrompt) -> Prompt:
    """A prompt of a request as the core takes it."""
    if prompt.point is not None:
        return Prompt(points=(prompt.point,), labels=(OBJECT,))
    return Prompt(box=prompt.box)


def annotate_frame(
    segmenter: Segmenter,
    frame: Frame,
    prompts: Sequence[Prompt],
    prior: ShapePrior,
    options: SlfOptions,
    report: Callable[[int, int], None],
) -> tuple[list[SegmentedObject], list[Outcome]]:
    """Masks, then boxes; each mask and each box is one step. ``report`` may raise in between."""
    objects: list[SegmentedObject] = []
    total = 2 * len(prompts)
    for start in range(0, len(prompts), AT_ONCE):
        report(start, total)
        group = prompts[start : start + AT_ONCE]
        objects += segment(segmenter, frame.picture, group, frame.calibration, frame.points)
    report(len(prompts), total)
    outcomes = annotate_cars(Scene(frame.calibration, objects, frame.points), prior, options)
    report(total, total)
    return objects, outcomes


def written(
    frame: Frame,
    objects: Sequence[SegmentedObject],
    outcomes: Sequence[Outcome],
    prior: ShapePrior,
    wanted: Wanted,
) -> Files:
    """Labels as JSON, the two drawings as PNG, and of the shapes, where there are any, what is
    wanted.
    """
    cars: list[KittiObject | None] = [
        outcome.label if isinstance(outcome, FittedCar) else None for outcome in outcomes
    ]
    fitted = [outcome for outcome in outcomes if isinstance(outcome, FittedCar)]
    voxel = wanted.occupancy if fitted else None
    labels = car_labels(frame.picture.shape[:2], objects, outcomes, frame.calibration)
    masks = [item.mask_HW for item in objects]
    drawn = picture_overlay(frame.picture, masks, cars, frame.calibration)
    rect = None if frame.points is None else frame.calibration.rect_from_velo(frame.points)
    return Files(
        labels=labels.model_dump_json().encode(),
        overlay=encode_picture(drawn),
        birds_eye=encode_picture(birds_eye(cars, rect)),
        meshes=glb_bytes(one_mesh([car.mesh for car in fitted]))
        if wanted.meshes and fitted
        else None,
        occupancy=None if voxel is None else occupancy_ply(fitted, prior, frame.calibration, voxel),
    )
