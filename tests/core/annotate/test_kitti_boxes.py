"""Boxes and the evaluation protocol; the golden cases replay other people's numbers."""

import math
from dataclasses import replace

import pytest
from gesso_core.annotate.kitti.boxes import (
    bev_iou,
    corners,
    iou_2d,
    iou_3d,
    observation_angle,
    points_in_boxes,
)
from gesso_core.annotate.kitti.evaluation import Metric, evaluate
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

CAR = (1.5, 1.6, 4.0, 2.0, 1.7, 20.0, 0.3)


def car(**changes: object) -> KittiObject:
    usual = KittiObject(
        kind="Car", truncated=0.0, occluded=0, alpha=0.2, box2d=(100, 100, 200, 180),
        size=CAR[:3], location=CAR[3:6], rotation_y=CAR[6],
    )  # fmt: skip
    return replace(usual, **changes)


@given(st.floats(-math.pi, math.pi), st.floats(-0.49, 0.49), st.floats(-0.49, 0.49))
def test_a_point_inside_stays_inside_however_the_box_is_turned(
    angle: float, along: float, across: float
) -> None:
    box = (*CAR[:6], angle)
    eight = corners([box])[0]
    # A point between the corners: from the middle along two of the box's own edges.
    length, width = eight[0] - eight[3], eight[0] - eight[1]
    inside = eight.mean(axis=0) + along * length + across * width
    assert points_in_boxes([inside], [box])[0, 0]
    assert not points_in_boxes([eight.mean(axis=0) + 0.51 * length], [box])[0, 0]


def test_a_moved_box_overlaps_by_what_is_left() -> None:
    moved = (*CAR[:6], 0.0)
    half = (*CAR[:3], CAR[3] + 2.0, *CAR[4:6], 0.0)
    assert bev_iou([moved], [half])[0, 0] == pytest.approx(1 / 3)
    lower = (*CAR[:4], CAR[4] + 0.75, CAR[5], 0.0)
    assert bev_iou([moved], [lower])[0, 0] == pytest.approx(1)
    assert iou_3d([moved], [lower])[0, 0] == pytest.approx(1 / 3)


def test_no_boxes_have_no_overlaps() -> None:
    assert bev_iou([], [CAR]).shape == (0, 1)
    assert iou_2d([(0, 0, 0, 0)], [(0, 0, 0, 0)])[0, 0] == 0


def test_the_observation_angle_is_wrapped() -> None:
    box = (*CAR[:3], -5.0, 1.7, 5.0, math.pi - 0.1)
    assert observation_angle([box])[0] == pytest.approx(math.pi - 0.1 + math.pi / 4 - 2 * math.pi)


def test_a_perfect_detector_of_few_cars_is_capped() -> None:
    truths = [[car()] for _ in range(11)]
    found = [[car(score=0.9)] for _ in range(11)]
    assert evaluate(truths, found)[0].ap40 == pytest.approx(100 * 10 / 40)


def test_a_van_is_neither_found_nor_missed() -> None:
    van = car(kind="Van", location=(8.0, 1.7, 20.0))
    truths = [[car(), van] for _ in range(50)]
    found = [[car(score=0.9), replace(van, kind="Car", score=0.8)] for _ in range(50)]
    assert evaluate(truths, found)[1].ap40 == pytest.approx(100)


@pytest.mark.parametrize(("metric", "expected"), [("image", 100.0), ("3d", 50.0)])
def test_regions_nobody_labelled_excuse_detections_in_the_picture_only(
    metric: Metric, expected: float
) -> None:
    aside = car(box2d=(400, 100, 500, 180), location=(-8.0, 1.7, 20.0), score=0.9)
    region = KittiObject(kind="DontCare", box2d=(390, 90, 510, 190))
    truths, found = [[car(), region]] * 50, [[car(score=0.9), aside]] * 50
    assert evaluate(truths, found, metric=metric)[0].ap40 == pytest.approx(expected)


def test_frames_and_detections_must_pair_up() -> None:
    with pytest.raises(InvalidRequest, match="2 frames"):
        evaluate([[car()], []], [[]])
    with pytest.raises(InvalidRequest, match="no score"):
        evaluate([[car()]], [[car()]])
