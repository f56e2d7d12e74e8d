"""Masks: run lengths as pycocotools writes them, boxes, agreement."""

import numpy as np
import pytest
from gesso_core.annotate.masks import (
    Overlap,
    area,
    box_of_mask,
    clip_to,
    decode_mask,
    encode_mask,
    mask_iou,
    overlap,
    pack_runs,
    pooled,
    unpack_runs,
)
from gesso_core.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

MASKS = arrays(bool, st.tuples(st.integers(1, 17), st.integers(1, 17)))


@given(MASKS)
def test_a_mask_comes_back_from_its_run_lengths(mask: np.ndarray) -> None:
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert np.array_equal(decode_mask(encode_mask(mask, compressed=False)), mask)


@given(MASKS)
def test_run_lengths_equal_those_of_pycocotools(mask: np.ndarray) -> None:
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = encode_mask(mask)
    assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
    x0, y0, x1, y1 = box_of_mask(mask)
    assert [x0, y0, x1 - x0, y1 - y0] == coco.toBbox(theirs).tolist()
    assert area(ours) == area(mask) == coco.area(theirs)


@given(st.lists(st.integers(0, 2**31), max_size=9))
def test_packed_runs_of_any_length_are_unpacked_again(runs: list[int]) -> None:
    assert unpack_runs(pack_runs(runs)) == runs


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ("P", "end in the middle"),
        ("S1", "cover 35 pixels"),
        ("~", "does not occur"),
        ([3, 4], "cover 7 pixels"),
        ([-1, 13], "cover 12 pixels"),
        ([10**30], "cover 10+ pixels"),
        ("o" * 20_000, "too long"),
    ],
)
def test_damaged_run_lengths_are_refused(counts: str | list[int], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        decode_mask({"size": [3, 4], "counts": counts})


@pytest.mark.parametrize("size", [[-3, -4], [1_000_000, 1_000_000]])
def test_a_mask_of_impossible_size_is_refused_before_it_is_unpacked(size: list[int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_mask({"size": size, "counts": [size[0] * size[1]]})
    assert refused.value.field == "size"


def test_ignored_pixels_count_neither_as_hits_nor_as_mistakes() -> None:
    predicted = np.array([[1, 1, 0, 0, 1]], dtype=bool)
    true = np.array([[1, 0, 1, 0, 0]], dtype=bool)
    ignored = np.array([[0, 0, 1, 1, 1]], dtype=bool)
    assert overlap(predicted, true) == Overlap(hit=1, wrong=2, missed=1)
    assert overlap(predicted, true, ignored) == Overlap(hit=1, wrong=1, missed=0)


def test_pooling_weighs_pictures_by_their_pixels() -> None:
    whole = pooled([Overlap(90, 5, 5), Overlap(0, 0, 100)])
    assert (whole.iou, whole.recall, whole.precision) == (90 / 200, 90 / 195, 90 / 95)
    assert whole.f == pytest.approx(180 / 290)


def test_two_empty_masks_agree_on_nothing() -> None:
    empty = np.zeros((4, 4), dtype=bool)
    assert mask_iou(empty, empty) == 0
    assert box_of_mask(empty) == (0, 0, 0, 0)


def test_a_clipped_mask_keeps_the_pixels_that_the_box_cuts() -> None:
    clipped = clip_to(np.ones((20, 30), bool), (5.5, -3.0, 10.0, 12.2))
    assert box_of_mask(clipped) == (5, 0, 10, 13)
    assert area(clipped) == 5 * 13
    grown = clip_to(np.ones((20, 30), bool), (5.0, 5.0, 10.0, 12.0), grow=1)
    assert box_of_mask(grown) == (4, 4, 11, 13)
