"""4-bit weights expanded at load: exact against the formulas, and what it costs in accuracy."""

import pytest
import torch
from gesso_kernels.expand_w4 import (
    expand_to_rows,
    nvfp4_to_fp8_rows,
    nvfp4_to_split_half,
    progressive_multipliers,
)
from gesso_kernels.number_formats import (
    e2m1_values,
    pack_consecutive,
    pack_split_half,
    unpack_split_half,
)
from torch import Tensor

ROWS, COLUMNS = 24, 320


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def int4_weight(lowest: int = -7) -> tuple[Tensor, Tensor]:
    codes = torch.randint(lowest, 8, (ROWS, COLUMNS), generator=generator())
    scale = (torch.rand(COLUMNS // 64, ROWS, generator=generator()) + 0.1).half()
    return codes, scale


def dequantized(codes: Tensor, scale_GN: Tensor) -> Tensor:
    """float64 [N, K]."""
    groups = codes.double().view(codes.shape[0], scale_GN.shape[0], -1)
    return (groups * scale_GN.T.double()[..., None]).flatten(1)


def test_int8_rows_are_exactly_the_formula() -> None:
    codes, scale = int4_weight()
    weight, row_scale = expand_to_rows(pack_split_half(codes), scale, "int8")
    w = dequantized(codes, scale).float()
    expected_scale = w.abs().amax(dim=1) / 127
    assert torch.equal(row_scale, expected_scale)
    assert weight.dtype == torch.int8
    assert torch.equal(weight.float(), (w / expected_scale[:, None]).round())
    assert weight.abs().amax(dim=1).eq(127).all()


def test_fp8_rows_are_exactly_the_formula() -> None:
    codes, scale = int4_weight()
    weight, row_scale = expand_to_rows(pack_split_half(codes), scale, "fp8")
    w = dequantized(codes, scale).float()
    assert torch.equal(row_scale, w.abs().amax(dim=1) / 448)
    expected = (w / row_scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(weight.float(), expected.float())


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_row_of_zeros_stays_zero(to: str) -> None:
    codes, scale = int4_weight()
    codes[3] = 0
    weight, row_scale = expand_to_rows(pack_split_half(codes), scale, to)  # type: ignore[arg-type]
    assert weight[3].float().eq(0).all()
    assert row_scale[3] == 0
    multipliers, row_scale = progressive_multipliers(pack_split_half(codes), scale)
    assert row_scale[3] == 0
    assert multipliers.min() >= 1


def test_progressive_multipliers_are_exactly_the_formula() -> None:
    codes, scale = int4_weight()
    multipliers, row_scale = progressive_multipliers(pack_split_half(codes), scale)
    expected_scale = scale.float().amax(dim=0) / 17
    assert torch.equal(row_scale, expected_scale)
    expected = (scale.float() / expected_scale).round().clamp(1, 17)
    assert torch.equal(multipliers.float(), expected)
    assert (codes.view(ROWS, -1, 64).abs().amax(dim=-1).T * multipliers).max() <= 119


def test_codes_of_minus_8_times_their_multiplier_fit_int8() -> None:
    codes, scale = int4_weight(lowest=-8)
    multipliers, row_scale = progressive_multipliers(pack_split_half(codes), scale)
    products = codes.view(ROWS, -1, 64) * multipliers.T[..., None].long()
    assert products.min() == -128
    got = products.flatten(1) * row_scale[:, None]
    error = (got - dequantized(codes, scale)).norm() / dequantized(codes, scale).norm()
    assert error < 0.03


def test_a_group_of_zeros_does_not_coarsen_the_multipliers_of_its_row() -> None:
    codes, scale = int4_weight()
    codes[:, :64] = 0
    _, expected = progressive_multipliers(pack_split_half(codes), scale)
    scale[0] = 1000.0
    _, got = progressive_multipliers(pack_split_half(codes), scale)
    assert torch.equal(got, expected)


def test_nvfp4_rows_and_split_halves_keep_the_values() -> None:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator())
    scale = (torch.rand(ROWS, COLUMNS // 16, generator=generator()) * 9 + 0.1).to(
        torch.float8_e4m3fn
    )
    alpha = torch.rand(ROWS, generator=generator())
    w = dequantized(e2m1_values(codes), scale.float().T)
    split, scale_GN = nvfp4_to_split_half(pack_consecutive(codes), scale)
    values = e2m1_values(unpack_split_half(split, signed=False))
    assert torch.equal(dequantized(values, scale_GN.float()), w)
    weight, row_scale = nvfp4_to_fp8_rows(pack_consecutive(codes), scale, alpha)
    exact = w * alpha.double()[:, None]
    got = weight.double() * row_scale.double()[:, None]
    assert (got - exact).norm() / exact.norm() < 0.03


def test_nvfp4_columns_are_padded_to_whole_groups_of_64() -> None:
    codes = torch.randint(0, 16, (4, 80), generator=generator())
    scale = torch.ones(4, 5).to(torch.float8_e4m3fn)
    split, scale_GN = nvfp4_to_split_half(pack_consecutive(codes), scale)
    assert (split.shape, scale_GN.shape) == ((4, 64), (8, 4))
    assert torch.equal(unpack_split_half(split, signed=False)[:, :80], codes.to(torch.int8))
    assert unpack_split_half(split, signed=False)[:, 80:].eq(0).all()


def test_scales_of_another_weight_are_refused() -> None:
    codes, scale = int4_weight()
    with pytest.raises(ValueError, match=r"shape \(4, 24\), expected one scale per 64"):
        expand_to_rows(pack_split_half(codes), scale[:-1], "int8")
    with pytest.raises(ValueError, match="expected one scale per 64"):
        progressive_multipliers(pack_split_half(codes), scale.T)


@pytest.mark.parametrize(
    ("form", "most_growth"), [("int8", 1.01), ("fp8", 1.04), ("progressive", 1.04)]
)
def test_the_error_of_a_layer_grows_little(form: str, most_growth: float) -> None:
    """A residual of normal weights, rows of different sizes, inputs with a few large channels."""
    rows, columns = 192, 640
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=draw) * torch.rand(rows, 1, generator=draw)
    x = torch.randn(128, columns, generator=draw)
    x[:, ::50] *= 8
    groups = weight.view(rows, -1, 64)
    scale = (groups.abs().amax(dim=-1) / 7).half()
    codes = (groups / scale.float()[..., None]).round().clamp(-7, 7).flatten(1)
    packed, scale_GN = pack_split_half(codes), scale.T.contiguous()
    if form == "progressive":
        multipliers, row_scale = progressive_multipliers(packed, scale_GN)
        expanded = dequantized(codes, multipliers) * row_scale.double()[:, None]
    else:
        w8, row_scale = expand_to_rows(packed, scale_GN, form)  # type: ignore[arg-type]
        expanded = w8.double() * row_scale.double()[:, None]

    def error(approximation: Tensor) -> Tensor:
        return (x.double() @ (approximation - weight.double()).T).norm()

    assert error(expanded) / error(dequantized(codes, scale_GN)) < most_growth
