"""Masks for boxes and points: one look at the picture, all prompts through it."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.masks import Mask, box_of_mask, clip_to
from gesso_core.annotate.segmenter.contract import Masks, Prompt, Segmenter
from gesso_core.annotate.slf.ground import find_ground
from gesso_core.annotate.slf.lift import FEW_POINTS, largest_cluster, raised_points
from gesso_core.annotate.slf.scene import SegmentedObject
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels

# How far apart a car's points may lie along and across the view, metres.
_CAR_SIZE: Final = (0.6, 6.0)
_OF_ONE: Final = 0.7  # share of a mask's points that a single car's cluster holds


def segment(
    segmenter: Segmenter,
    picture_HW3: Pixels,
    prompts: Sequence[Prompt],
    calibration: Calibration,
    points_velo_N4: NDArray[np.float32] | None = None,
) -> list[SegmentedObject]:
    """One object per prompt, in order.

    A box keeps only the mask inside it. A point gets the proposal of highest predicted IoU whose
    LiDAR points make one cluster of a car's size, or the highest of all where none does.

    Raises:
        InvalidRequest: a box beside the picture, a point outside it, a prompt without either.
    """
    if any(prompt.box is None and not prompt.points for prompt in prompts):
        raise InvalidRequest("a car is prompted by a box or by points on it", field="prompt")
    embedding = segmenter.embed(picture_HW3)
    boxed = [i for i, prompt in enumerate(prompts) if prompt.box is not None]
    pointed = [i for i, prompt in enumerate(prompts) if prompt.box is None]
    # The segmenter itself takes the best of three proposals for a lone box: none need be kept.
    masks = segmenter.predict(embedding, [prompts[i] for i in boxed])
    found = {i: _in_box(masks, row, prompts[i]) for row, i in enumerate(boxed)}
    if pointed:
        masks = segmenter.predict(embedding, [prompts[i] for i in pointed], multimask=True)
        is_car = _car_test(calibration, points_velo_N4)
        found |= {i: _likeliest(masks, row, is_car) for row, i in enumerate(pointed)}
    return [found[i] for i in range(len(prompts))]


def _in_box(masks: Masks, row: int, prompt: Prompt) -> SegmentedObject:
    assert prompt.box is not None
    mask = clip_to(masks.masks_PHW[row], prompt.box)
    return SegmentedObject(mask, prompt.box, float(masks.predicted_iou_P[row]))


def _likeliest(masks: Masks, row: int, is_car: Callable[[Mask], bool]) -> SegmentedObject:
    ranked = _ranked(masks, row)
    mask, trust = next((pair for pair in ranked if is_car(pair[0])), ranked[0])
    left, top, right, bottom = map(float, box_of_mask(mask))
    return SegmentedObject(mask, (left, top, right, bottom), trust)


def _car_test(
    calibration: Calibration, points_velo_N4: NDArray[np.float32] | None
) -> Callable[[Mask], bool]:
    """Whether the scan's points in a mask make one cluster of a car's size."""
    rect = np.zeros((0, 3))
    if points_velo_N4 is not None:
        rect = calibration.rect_from_velo(points_velo_N4)
    ground = find_ground(rect)

    def is_car(mask_HW: Mask) -> bool:
        points = raised_points(rect, mask_HW, calibration, ground)
        return len(points) >= FEW_POINTS and _is_one_car(points)

    return is_car


def _ranked(masks: Masks, i: int) -> list[tuple[Mask, float]]:
    """The proposals of one prompt, the most trusted first."""
    if masks.candidates is None:
        return [(masks.masks_PHW[i], float(masks.predicted_iou_P[i]))]
    trust = masks.candidates.predicted_iou_PM[i]
    order = np.argsort(-trust, kind="stable")
    return [(masks.candidates.masks_PMHW[i, m], float(trust[m])) for m in order]


def _is_one_car(points_N3: NDArray[np.float64]) -> bool:
    cluster = largest_cluster(points_N3)
    low, high = _CAR_SIZE
    spread = np.hypot(*np.ptp(cluster[:, ::2], axis=0))
    return len(cluster) > _OF_ONE * len(points_N3) and bool(low < spread < high)
