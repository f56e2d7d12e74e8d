"""Aspect-ratio tables, and pictures that come back in the very size that was asked for."""

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.sampling.aspect_ratio import aspect_table, bin_for, resize_and_crop
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    given_size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    wanted=st.tuples(st.integers(1, 120), st.integers(1, 120)),
)
def test_the_picture_has_exactly_the_wanted_size(
    given_size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    image = torch.zeros(1, 1, *given_size)
    assert resize_and_crop(image, *wanted).shape == (1, 1, *wanted)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(32, 256).map(lambda side: 8 * side),
    width=st.integers(32, 256).map(lambda side: 8 * side),
    base=st.sampled_from([512, 1024]),
)
def test_no_request_comes_back_a_pixel_short(height: int, width: int, base: int) -> None:
    table_height, table_width = bin_for(height, width, aspect_table(base))
    image = torch.zeros(1, 1, table_height, table_width, dtype=torch.bfloat16)
    assert resize_and_crop(image, height, width).shape[-2:] == (height, width)


def test_a_picture_of_the_wanted_size_is_left_alone() -> None:
    image = torch.rand(1, 3, 5, 7)
    assert resize_and_crop(image, 5, 7) is image


def test_the_crop_keeps_the_centre() -> None:
    image = torch.arange(9.0).expand(1, 1, 3, 9)
    assert resize_and_crop(image, 3, 3)[0, 0, 0].tolist() == [3, 4, 5]


def test_tables_hold_together() -> None:
    half = {ratio: (2 * h, 2 * w) for ratio, (h, w) in aspect_table(512).items()}
    assert half == aspect_table(1024)
    assert [len(aspect_table(base)) for base in (512, 1024, 2048, 4096)] == [33, 33, 40, 40]
    for base, side in ((64, 16), (128, 32), (512, 32), (4096, 32)):
        for ratio, (height, width) in aspect_table(base).items():
            assert height % side == width % side == 0
            assert height / width == pytest.approx(ratio, abs=0.02)


def test_the_closest_ratio_wins() -> None:
    assert bin_for(1080, 1920, aspect_table(1024)) == (768, 1344)
    assert bin_for(64, 64, aspect_table(64)) == (64, 64)
    assert bin_for(100, 60, aspect_table(64)) == (80, 48)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="0x64"):
        bin_for(64, 0, aspect_table(64))
    with pytest.raises(InvalidRequest, match="both sides"):
        resize_and_crop(torch.zeros(1, 1, 4, 4), -1, 4)
    with pytest.raises(ConfigError, match="base 100"):
        aspect_table(100)
