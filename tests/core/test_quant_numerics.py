"""Quantizers, smoothing, the low-rank branch, GPTQ and the shift, each against what defines it."""

from collections.abc import Callable

import pytest
import torch
from gesso_core.errors import NumericalError
from gesso_core.quant.gptq import gptq_levels, hessian
from gesso_core.quant.low_rank import Branch, iterate_branch, low_rank_branch
from gesso_core.quant.quantizers import (
    WeightGrid,
    e4m3_ties_up,
    fake_quantize_input,
    fake_quantize_weight,
    nearest_e2m1,
    quantize_input,
    quantize_int4,
    quantize_nvfp4,
)
from gesso_core.quant.shift import GELU_SHIFT, branch_bias, shifted_bias, split_columns
from gesso_core.quant.smoothing import exponent_pairs, search_smooth, smooth_scale, span
from gesso_kernels.number_formats import e2m1_codes, e2m1_values
from torch import Tensor
from torch.nn.functional import gelu, linear


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# ---- quantizers


def test_an_int4_scale_is_rounded_to_16_bit_before_it_divides() -> None:
    x = torch.zeros(1, 64)
    # 1.003 / 7 rounds up to the bfloat16 0.1436; 0.5 · 0.1433 would round the other way.
    x[0, :2] = torch.tensor([1.003, 0.2152])
    codes, scale = quantize_int4(x, torch.bfloat16)
    assert scale.item() == torch.tensor(1.003 / 7).bfloat16().item()
    assert 0.2152 / (1.003 / 7) > 1.5 > 0.2152 / scale.item()
    assert codes[0, :2].tolist() == [7, 1]


def test_codes_round_half_to_even_and_stay_symmetric() -> None:
    x = torch.zeros(1, 64)
    x[0, :6] = torch.tensor([7, -7, 0.5, 1.5, 2.5, -2.5])
    assert quantize_int4(x, torch.float16)[0][0, :6].tolist() == [7, -7, 0, 2, 2, -2]


def test_a_group_of_zeros_has_the_scale_1() -> None:
    x = torch.zeros(2, 128)
    assert quantize_int4(x, torch.bfloat16)[1].tolist() == [[1, 1], [1, 1]]
    codes, scale, tensor_scale = quantize_nvfp4(x, torch.bfloat16)
    assert not codes.any()
    assert scale.float().unique().tolist() == [1]
    assert tensor_scale.tolist() == [1]
    assert not fake_quantize_weight(x, "int8", torch.bfloat16).any()


def test_unsigned_codes_have_twice_the_resolution() -> None:
    x = normal(32, 256).abs()
    errors = []
    for unsigned in (False, True):
        codes, scale = quantize_int4(x, torch.float16, unsigned=unsigned)
        values = codes.view(32, 4, 64) * scale.float()[..., None]
        errors.append(relative(values.view(32, 256), x))
    assert 0.4 < errors[1] / errors[0] < 0.52


def test_an_e4m3_tie_goes_up_and_large_values_saturate() -> None:
    x = torch.tensor([1.8125, 0.53125, 1.81, 447.0, 1e6, 0.0])
    assert e4m3_ties_up(x).float().tolist() == [1.875, 0.5625, 1.75, 448, 448, 0]


@pytest.mark.parametrize("ties", ["even", "up"])
def test_arithmetic_e2m1_agrees_with_the_table(ties: str) -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = [torch.nextafter(middles, torch.full((7,), to)) for to in (0.0, 9.0)]
    x = torch.cat([middles, *beside, torch.linspace(0, 9, 501), normal(1000)])
    x = torch.cat([x, -x])
    assert torch.equal(nearest_e2m1(x, ties), e2m1_values(e2m1_codes(x, ties)))


def test_concatenated_linears_keep_their_own_tensor_scale() -> None:
    small, large = normal(4, 32), 100 * normal(8, 32, seed=1)
    codes, scale, whole = quantize_nvfp4(torch.cat([small, large]), torch.float16, parts=(4, 8))
    for rows, part in ((slice(0, 4), small), (slice(4, 12), large)):
        alone = quantize_nvfp4(part, torch.float16)
        assert torch.equal(codes[rows], alone[0])
        assert torch.equal(scale[rows].float(), alone[1].float())
        assert whole[rows].unique() == alone[2]


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "int8"])
def test_codes_and_scales_of_a_weight_stand_for_its_rounded_values(weight: str) -> None:
    w = normal(6, 128)
    grid = WeightGrid.fit(w, weight, torch.bfloat16)
    levels = grid.nearest(w / grid.step(128))
    assert torch.equal(levels * grid.step(128), fake_quantize_weight(w, weight, torch.bfloat16))
    assert grid.codes(levels).shape == ((6, 128) if weight == "int8" else (6, 64))


def test_finer_formats_have_smaller_errors() -> None:
    w = normal(64, 512)
    weights = [relative(fake_quantize_weight(w, f, torch.bfloat16), w) for f in ("int4", "nvfp4")]
    inputs = [relative(fake_quantize_input(w, f), w) for f in ("int4", "nvfp4", "fp8", "int8")]
    assert weights == sorted(weights, reverse=True)
    assert inputs == sorted(inputs, reverse=True)
    assert inputs[-1] < 0.01 < inputs[0] < 0.12
    assert fake_quantize_input(w, "16bit") is w


def test_the_runtime_divides_by_the_scale_before_its_rounding() -> None:
    h = torch.zeros(1, 64, dtype=torch.bfloat16)
    h[0, :2] = torch.tensor([1.0, 0.2148])
    rounded = torch.tensor(1 / 7).bfloat16()
    found = quantize_input(h, "int4")
    assert found.scale.item() == rounded.item()
    assert found.levels[0, :2].tolist() == [7, round(0.2148 * 7)]


@pytest.mark.parametrize("activation", ["int4", "uint4", "nvfp4", "int8", "fp8"])
def test_a_token_of_zeros_stays_zero(activation: str) -> None:
    h = torch.cat([torch.zeros(1, 64), normal(1, 64).abs()])
    values = fake_quantize_input(h, activation)
    assert not values[0].any()
    assert relative(values[1], h[1]) < 0.2


def test_fp4_inputs_too_small_for_a_scale_become_zero() -> None:
    assert not fake_quantize_input(torch.full((1, 64), 1e-4), "nvfp4").any()


# ---- smoothing


def test_the_two_families_of_candidates_follow_the_identity() -> None:
    pairs = exponent_pairs(20)
    assert len(pairs) == 39
    assert pairs[:3] == [(0, 0), (0.05, 0), (0.1, 0)]
    assert pairs[19] == (0.95, 0)
    assert pairs[20:22] == [(0.05, 0.95), (0.1, 0.9)]
    assert exponent_pairs(4, beta=-1) == [(0, 0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    assert exponent_pairs(2, alpha=0, beta=0.5) == [(0, 0), (0, 0.5)]


def test_unknown_families_of_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=0\.5, beta=-3; give"):
        exponent_pairs(20, beta=-3)


def test_smoothing_survives_dead_channels() -> None:
    x_span, w_span = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 4.0])
    assert smooth_scale(x_span, w_span, (0.5, 0.5)).tolist() == [2, 1, 0.5]
    assert smooth_scale(x_span, torch.tensor([1.0, 1, 0]), (0.5, 0.5)).tolist() == [1, 1, 1]
    assert smooth_scale(x_span, w_span, (0, 0.5)).tolist() == [1, 1, 0.5]


def test_spans_are_taken_over_all_rows() -> None:
    x = torch.tensor([[1.0, -4.0], [7.0, 0.0]])
    assert span(x).tolist() == [7, 4]
    assert span(x, "RootMeanSquare").square().tolist() == pytest.approx([25, 8])


def test_of_equal_candidates_the_later_wins() -> None:
    errors = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    pairs = [(i / 10, 0.0) for i in range(5)]
    found = search_smooth(pairs, torch.tensor, lambda smooth: next(errors))
    assert found.exponents == (0.3, 0)
    assert found.errors == [3, 1, 2, 1, 5]


# ---- low-rank branch


def planted(rows: int, columns: int) -> Tensor:
    signal = normal(rows, 12, seed=1) @ normal(12, columns, seed=2)
    return signal + normal(rows, columns, seed=3)


@pytest.mark.parametrize(("rows", "columns"), [(96, 160), (160, 96)])
def test_the_exact_branch_leaves_the_tail_of_the_singular_values(rows: int, columns: int) -> None:
    weight = planted(rows, columns)
    branch = low_rank_branch(weight, 16, "exact", seeded())
    tail = torch.linalg.svdvals(weight)[16:].norm()
    left = (weight - branch.product()).norm()
    torch.testing.assert_close(left, tail, rtol=1e-5, atol=0)
    assert branch.down_RK.shape == (16, columns)
    torch.testing.assert_close(branch.down_RK @ branch.down_RK.mT, torch.eye(16))


@pytest.mark.parametrize(("rows", "columns"), [(200, 320), (320, 200)])
def test_the_randomized_branch_is_nearly_as_good(rows: int, columns: int) -> None:
    weight = planted(rows, columns)
    left = [
        float((weight - low_rank_branch(weight, 16, svd, seeded()).product()).norm())
        for svd in ("exact", "randomized")
    ]
    assert left[0] <= left[1] < 1.005 * left[0]


def test_a_randomized_branch_depends_on_its_generator_only() -> None:
    weight = planted(100, 120)
    first, second, other = (low_rank_branch(weight, 8, "randomized", seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first.product(), second.product())
    assert not torch.equal(first.product(), other.product())


def test_rank_0_is_no_branch() -> None:
    branch = low_rank_branch(planted(8, 64), 0, "randomized", seeded())
    assert branch.product().shape == (8, 64)
    assert not branch.product().any()


def test_iterations_stop_at_the_first_increase_and_keep_the_best() -> None:
    errors = iter([5.0, 4.0, 4.0, 4.5, 1.0])
    branches = [Branch(torch.full((1, 4), float(i)), torch.ones(4, 1)) for i in range(5)]
    decomposed = iter(branches)
    found = iterate_branch(
        torch.ones(4, 4),
        iterations=100,
        decompose=lambda matrix, near: next(decomposed),
        quantize=torch.round,
        error=lambda branch, residual: next(errors),
    )
    assert found.errors == [5, 4, 4, 4.5]
    assert found.branch is branches[2]
    assert torch.equal(found.residual_NK, torch.full((4, 4), -1.0))


def test_iterations_refit_to_what_the_grid_could_not_represent() -> None:
    weight = planted(64, 128)

    def quantize(residual: Tensor) -> Tensor:
        return fake_quantize_weight(residual, "int4", torch.bfloat16)

    found = iterate_branch(
        weight,
        iterations=20,
        decompose=lambda matrix, near: low_rank_branch(matrix, 8, "exact", seeded()),
        quantize=quantize,
        error=lambda branch, residual: float((weight - branch.product() - residual).norm()),
    )
    assert min(found.errors) < 0.97 * found.errors[0]


# ---- GPTQ


def nearest(values: Tensor) -> Tensor:
    return values.round().clamp(-7, 7)


def correlated(rows: int, columns: int) -> Tensor:
    shared = normal(rows, columns // 8, seed=4) @ normal(columns // 8, columns, seed=5)
    return shared + 0.3 * normal(rows, columns, seed=6)


def test_gptq_lowers_the_output_error_on_correlated_inputs() -> None:
    x, weight = correlated(1000, 192), normal(48, 192)
    step = WeightGrid.fit(weight, "int4", torch.bfloat16).step(192)
    levels = gptq_levels(weight, step, hessian(x), nearest)
    plain = relative(x @ (nearest(weight / step) * step).mT, x @ weight.mT)
    assert relative(x @ (levels * step).mT, x @ weight.mT) < 0.6 * plain
    assert torch.equal(levels, nearest(levels))


def test_gptq_with_independent_inputs_of_one_size_is_plain_rounding() -> None:
    weight = normal(5, 64)
    step = torch.full_like(weight, 0.5)
    levels = gptq_levels(weight, step, torch.eye(64), nearest)
    assert torch.equal(levels, nearest(weight / step))


@pytest.mark.parametrize("block", [16, 50, 256])
def test_the_blocks_of_gptq_change_nothing(block: int) -> None:
    x, weight = correlated(600, 96), normal(8, 96)
    step = torch.full_like(weight, 0.4)
    levels = gptq_levels(weight, step, hessian(x), nearest, block=block)
    whole = gptq_levels(weight, step, hessian(x), nearest, block=96)
    assert (levels == whole).float().mean() > 0.995


def test_gptq_gives_dead_columns_the_level_0() -> None:
    x = correlated(600, 64)
    x[:, 9] = 0
    levels = gptq_levels(normal(8, 64), torch.full((8, 64), 0.4), hessian(x), nearest)
    assert not levels[:, 9].any()


def test_gptq_raises_the_damping_for_inputs_of_low_rank() -> None:
    x = 1e3 * normal(400, 2) @ normal(2, 64, seed=1)
    levels = gptq_levels(normal(8, 64), torch.full((8, 64), 0.4), hessian(x), nearest, damping=5e-8)
    assert levels.isfinite().all()


def test_gptq_names_the_cause_of_useless_statistics() -> None:
    broken = -torch.eye(8)
    with pytest.raises(NumericalError, match="check the calibration inputs"):
        gptq_levels(normal(2, 8), torch.ones(2, 8), broken, nearest)


# ---- shift


def test_a_shifted_input_with_the_repaired_bias_is_the_same_function() -> None:
    x, weight, bias = gelu(normal(20, 64)), normal(16, 64, seed=1), normal(16, seed=2)
    assert float(x.min()) > -GELU_SHIFT
    for given in (bias, None):
        repaired = shifted_bias(weight, given, GELU_SHIFT)
        shifted = linear(x + GELU_SHIFT, weight, repaired)
        torch.testing.assert_close(shifted, linear(x, weight, given), atol=1e-5, rtol=1e-5)


def test_the_branch_may_read_the_input_without_its_shift() -> None:
    x, up, down = normal(10, 64), normal(16, 4, seed=1), normal(4, 64, seed=2)
    bias = normal(16, seed=3)
    with_shift = (x + GELU_SHIFT) @ down.mT @ up.mT + bias
    without = x @ down.mT @ up.mT + branch_bias(bias, up, down, GELU_SHIFT)
    torch.testing.assert_close(without, with_shift, atol=1e-4, rtol=1e-4)


def test_parts_of_a_linear_add_up_to_it() -> None:
    x, weight, bias = normal(5, 48), normal(8, 48, seed=1), normal(8, seed=2)
    first, second = split_columns(weight, bias, [16, 32])
    assert first[1] is None
    total = linear(x[:, :16], *first) + linear(x[:, 16:], *second)
    torch.testing.assert_close(total, linear(x, weight, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [split_columns])
def test_parts_that_do_not_add_up_are_refused(split: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="do not add up to the 48"):
        split(normal(8, 48), None, [16, 16])
