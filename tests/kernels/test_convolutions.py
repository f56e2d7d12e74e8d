"""Fast convolutions against the direct ones."""

import pytest
import torch
from gesso_kernels.upsample_conv import fold_phases, upsample_conv2d, upsample_conv2d_ref
from gesso_kernels.winograd_conv import tile_size, winograd_conv2d, winograd_conv2d_ref
from torch import Tensor
from torch.nn import functional as F

# Outputs have unit variance; Winograd in bf16 rounds inputs, weights and products once each.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 0.06}


def normal(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(1, 8, 8, 4, 4), (2, 16, 5, 8, 12), (1, 3, 32, 20, 4)],
    ids=lambda n: f"{n}",
)
def test_winograd_agrees_with_the_direct_convolution(
    batch: int, channels: int, outputs: int, height: int, width: int, dtype: torch.dtype
) -> None:
    x = normal(batch, channels, height, width, dtype=dtype)
    taps = normal(9, outputs, channels, dtype=dtype, std=(9 * channels) ** -0.5)
    bias = normal(outputs, dtype=dtype)
    got = winograd_conv2d(x, taps, bias)
    exact = winograd_conv2d_ref(x.double(), taps.double(), bias.double())
    torch.testing.assert_close(got.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_winograd_applies_the_activation_after_the_bias(activation: str) -> None:
    x, taps, bias = normal(1, 4, 8, 8), normal(9, 6, 4, std=0.2), normal(6)
    expected = getattr(F, activation)(winograd_conv2d_ref(x, taps, bias))
    got = winograd_conv2d(x, taps, bias, activation)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_winograd_in_strips_and_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, taps = normal(1, 8, 24, 16), normal(9, 10, 8, std=0.1)
    whole = winograd_conv2d(x, taps)
    monkeypatch.setattr("gesso_kernels.winograd_conv._STRIP_ELEMENTS", (36 * 4 * 8, 36 * 4 * 8))
    monkeypatch.setattr("gesso_kernels.winograd_conv._KERNEL_ELEMENTS", 36 * 8 * 4)
    torch.testing.assert_close(winograd_conv2d(x, taps), whole, atol=1e-6, rtol=1e-6)


def test_tiles_are_larger_where_numbers_have_more_digits() -> None:
    assert (tile_size(torch.float32), tile_size(torch.bfloat16)) == (4, 2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 6), (8, 3)])
def test_phase_convolution_is_upsampling_followed_by_convolution(height: int, width: int) -> None:
    x, weight, bias = normal(2, 12, height, width), normal(7, 12, 3, 3, std=0.1), normal(7)
    got = upsample_conv2d(x, fold_phases(weight), bias)
    torch.testing.assert_close(got, upsample_conv2d_ref(x, weight, bias), atol=1e-5, rtol=0)
