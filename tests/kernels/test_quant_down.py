"""Quantizing kernels: their references against first principles, then the kernels against those.

The interpreter runs fp16 only (its bf16 products are wrong). Its cast to float8 loses carries and
breaks ties away from even; the kernels never use that cast: they encode e4m3 by integer arithmetic
and store bytes, so fp8 and nvfp4 are compared bit for bit like the others.
"""

from collections.abc import Callable

import pytest
import torch
from gesso_kernels.glu_quant_down import (
    glu_quant_down,
    glu_quant_down_op,
    glu_quant_down_ref,
    glu_quant_down_triton,
)
from gesso_kernels.norm_quant_down import (
    norm_quant_down,
    norm_quant_down_op,
    norm_quant_down_ref,
    norm_quant_down_triton,
)
from gesso_kernels.number_formats import (
    e2m1_codes,
    e2m1_values,
    unpack_consecutive,
    unpack_split_half,
)
from gesso_kernels.quant_down import (
    FORMATS,
    InputFormat,
    Quantized,
    quant_down,
    quant_down_op,
    quant_down_ref,
    quant_down_triton,
)
from torch import Tensor

# In the interpreter only: on a GPU, quotients may differ in their last bit.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
SHAPES = [(1, 64, 64, 0), (7, 192, 192, 16), (70, 320, 320, 32), (7, 320, 300, 48)]  # M K width R
SHIFT = 0.171875


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(K: int, rank: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """λ between ¼ and 4, and a first half of a branch."""
    return torch.exp2(normal(K, seed=1).clamp(-2, 2)).to(dtype), (normal(rank, K) / 8).to(dtype)


def outliers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Tokens whose channels have very different sizes."""
    return (normal(*shape) * torch.exp(normal(shape[-1], seed=2))).to(dtype)


def values_of(out: Quantized, format_: InputFormat) -> Tensor:
    """Dequantized h, fp32 [M, K]."""
    if format_ in ("int8", "fp8"):
        return out.codes.float() * out.scale[:, None]
    if format_ == "nvfp4":
        values, scale_MG = e2m1_values(unpack_consecutive(out.codes, signed=False)), out.scale
    else:
        values = unpack_split_half(out.codes, signed=format_ == "int4").float()
        scale_MG = out.scale.mT
    groups = values.view(*scale_MG.shape, -1)
    return (groups * scale_MG.float()[..., None]).flatten(1)


def bytes_of(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def assert_same(got: Quantized, expected: Quantized) -> None:
    assert got.codes.dtype == expected.codes.dtype
    assert torch.equal(bytes_of(got.codes), bytes_of(expected.codes))
    if expected.scale.dtype == torch.float32:
        torch.testing.assert_close(got.scale, expected.scale, rtol=1e-6, atol=0)
    else:
        assert torch.equal(bytes_of(got.scale), bytes_of(expected.scale))
    error = (got.low_rank_MR - expected.low_rank_MR).norm()
    assert error <= 1e-3 * expected.low_rank_MR.norm()


# Largest error of a code in units of max|h| of its group or row: half a step of the grid; for
# float grids half the step at the top, plus what the rounding of an e4m3 scale and of h costs.
STEP = {"int4": 0.5 / 7, "uint4": 0.5 / 15, "int8": 0.5 / 127, "fp8": 16 / 448, "nvfp4": 1 / 6}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantized_inputs_are_within_half_a_step(
    format_: InputFormat, dtype: torch.dtype
) -> None:
    x, (smooth, down) = outliers(50, 192, dtype=dtype), layer(192, 16, dtype)
    x = x.abs() if format_ == "uint4" else x
    out = quant_down_ref(x, smooth, down, format=format_)
    h_MK = x.float() / smooth.float()
    group = {"int8": 192, "fp8": 192, "nvfp4": 16}.get(format_, 64)
    largest = h_MK.view(50, -1, group).abs().amax(-1).repeat_interleave(group, dim=1)
    slack = 0.05 if format_ == "nvfp4" else 4 * torch.finfo(dtype).eps + 1e-6
    assert ((values_of(out, format_) - h_MK).abs() <= largest * (STEP[format_] + slack)).all()
    branch = x.double() @ down.double().mT
    assert (out.low_rank_MR - branch).norm() <= 1e-5 * branch.norm()


@pytest.mark.parametrize("format_", FORMATS)
def test_zeros_stay_zeros_without_nan(format_: InputFormat) -> None:
    out = quant_down_ref(torch.zeros(3, 128), *layer(128, 16, torch.float32), format=format_)
    assert not bytes_of(out.codes).any()
    assert not bytes_of(out.scale).any()
    assert not out.low_rank_MR.any()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("size", [1e-40, 1e-30, 6e4, 1e30], ids=str)
def test_extreme_sizes_give_finite_values(format_: InputFormat, size: float) -> None:
    x = (normal(4, 128).sign() * size).to(torch.bfloat16)
    out = quant_down_ref(x, torch.ones(128).bfloat16(), torch.zeros(16, 128), format=format_)
    assert values_of(out, format_).isfinite().all()


@pytest.mark.parametrize("format_", ["int4", "nvfp4"])
def test_an_outlier_spoils_only_its_own_group(format_: InputFormat) -> None:
    x, (smooth, down) = normal(2, 192), layer(192, 16, torch.float32)
    before = values_of(quant_down_ref(x, smooth, down, format=format_), format_)
    x[1, 70] = 1000.0
    after = values_of(quant_down_ref(x, smooth, down, format=format_), format_)
    changed = (before != after).nonzero()
    assert set(changed[:, 0].tolist()) == {1}
    assert set((changed[:, 1] // 64).tolist()) == {1}
    # The outlier fills the grid, so its neighbours are rounded away.
    assert (after[1, 64:80] != 0).sum() == 1


@pytest.mark.parametrize("format_", FORMATS)
def test_missing_columns_count_as_zero_even_with_a_shift(format_: InputFormat) -> None:
    x, (smooth, down) = normal(5, 70).abs(), layer(128, 16, torch.float32)
    smooth[70:] = 1e-3  # a padded column with a shift would have the largest h
    whole = torch.nn.functional.pad(x, (0, 58), value=-SHIFT)
    got = quant_down_ref(x, smooth, down, format=format_, shift=SHIFT)
    expected = quant_down_ref(whole, smooth, down, format=format_, shift=SHIFT)
    assert torch.equal(bytes_of(got.codes), bytes_of(expected.codes))
    assert torch.equal(bytes_of(got.scale), bytes_of(expected.scale))
    torch.testing.assert_close(got.low_rank_MR, x @ down[:, :70].mT)


def test_the_shift_is_in_the_codes_but_not_in_the_branch() -> None:
    x, (smooth, down) = normal(9, 64), layer(64, 16, torch.float32)
    got = quant_down_ref(x, smooth, down, format="int8", shift=SHIFT)
    moved = quant_down_ref(x + SHIFT, smooth, down, format="int8")
    assert torch.equal(got.codes, moved.codes)
    torch.testing.assert_close(got.low_rank_MR, x @ down.mT)


def test_nvfp4_codes_are_those_of_the_number_format() -> None:
    x = torch.cat([normal(40, 64), torch.arange(-640.0, 640.0).view(20, 64) / 64]).half()
    out = quant_down_ref(x, torch.ones(64).half(), torch.zeros(0, 64).half(), format="nvfp4")
    scaled = x.float().view(60, 4, 16) / out.scale.float()[..., None]
    assert torch.equal(unpack_consecutive(out.codes, signed=False), e2m1_codes(scaled).flatten(1))


def test_int4_takes_its_factor_from_the_scale_before_rounding() -> None:
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, 0], x[0, 1] = 1.0, 0.78564453125  # 5.4995 steps of 1/7, but 5.5009 of 1/7 in fp16
    out = quant_down_ref(x, torch.ones(64).half(), torch.zeros(0, 64).half(), format="int4")
    assert unpack_split_half(out.codes, signed=True)[0, :2].tolist() == [7, 5]
    assert (x[0, 1].float() / out.scale[0, 0].float()).round() == 6


@interpreted
@pytest.mark.parametrize("shift", [0.0, SHIFT])
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_codes_of_its_reference(
    shape: tuple[int, int, int, int], format_: InputFormat, shift: float
) -> None:
    M, K, width, rank = shape
    x = outliers(M, width)
    x[M // 2] = 0.0
    arguments = (x, *layer(K, rank))
    got = quant_down_triton(*arguments, format=format_, shift=shift)
    assert_same(got, quant_down_ref(*arguments, format=format_, shift=shift))


@interpreted
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_kernel_agrees_with_its_reference(
    shape: tuple[int, int, int, int], format_: InputFormat
) -> None:
    M, K, width, rank = shape
    x = outliers(2, (M + 1) // 2, width) + 3
    shift, scale = (normal(2, 2, 1, width) * 0.3).half()
    arguments = (x, shift, scale, 1e-6, *layer(K, rank))
    assert_same(
        norm_quant_down_triton(*arguments, format=format_),
        norm_quant_down_ref(*arguments, format=format_),
    )


@interpreted
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_glu_kernel_agrees_with_its_reference(
    shape: tuple[int, int, int, int], format_: InputFormat
) -> None:
    M, K, width, rank = shape
    arguments = (outliers(M, 2 * width), *layer(K, rank))
    assert_same(
        glu_quant_down_triton(*arguments, format=format_),
        glu_quant_down_ref(*arguments, format=format_),
    )


@interpreted
def test_kernels_take_strided_inputs_and_no_rows() -> None:
    smooth, down = layer(64, 16)
    x = outliers(6, 128)[::2, 32:96]
    assert_same(
        quant_down_triton(x, smooth, down, format="int8"),
        quant_down_ref(x, smooth, down, format="int8"),
    )
    tokens = outliers(2, 10, 64)[:, 1:6]
    modulation = normal(2, 6, 64).half()
    norm = (tokens, modulation[:, 1:2], modulation[:, 4:5], 1e-6, smooth, down)
    assert_same(
        norm_quant_down_triton(*norm, format="int4"), norm_quant_down_ref(*norm, format="int4")
    )


@interpreted
@pytest.mark.parametrize("format_", FORMATS)
def test_no_rows_give_no_rows(format_: InputFormat) -> None:
    arguments = (outliers(1, 64)[:0], *layer(64, 16))
    expected = quant_down_ref(*arguments, format=format_)
    assert expected.low_rank_MR.shape == (0, 16)
    assert_same(quant_down_triton(*arguments, format=format_), expected)


def test_smooth_and_down_are_taken_in_the_type_of_x() -> None:
    x, (smooth, down) = outliers(5, 64, dtype=torch.bfloat16), layer(64, 16, torch.float32)
    got = quant_down_ref(x, smooth, down, format="int4")
    assert_same(got, quant_down_ref(x, smooth.bfloat16(), down.bfloat16(), format="int4"))


@interpreted
def test_the_norm_is_right_for_tokens_far_from_zero() -> None:
    # 250 deviations from 0: a variance from a difference of sums would be off by some percent.
    x = (normal(1, 5, 192) * 16 + 4000).half()
    shift, scale = (normal(2, 1, 1, 192) * 0.3).half()
    smooth, down = layer(192, 16)
    y = torch.nn.functional.layer_norm(x.double(), (192,), eps=1e-6) * (1 + scale.double()) + shift
    branch = y[0] @ down.double().mT
    for function in (norm_quant_down_ref, norm_quant_down_triton):
        got = function(x, shift, scale, 1e-6, smooth, down, format="int8")
        assert (got.low_rank_MR - branch).norm() <= 1e-3 * branch.norm()


def test_the_glu_takes_its_values_first() -> None:
    smooth, down = layer(64, 16, torch.float32)
    x = outliers(5, 128, dtype=torch.float32)
    y = x[:, :64] * torch.nn.functional.silu(x[:, 64:])
    got = glu_quant_down(x, smooth, down, format="int8")
    torch.testing.assert_close(got.low_rank_MR, y @ down.mT)


OPS = {
    "quant_down": (quant_down_op, lambda x, s, d: (x, s, d, "uint4", SHIFT)),
    "norm_quant_down": (
        norm_quant_down_op,
        lambda x, s, d: (x[None], x[None, :1], x[None, 1:2], 1e-6, s, d, "nvfp4"),
    ),
    "glu_quant_down": (glu_quant_down_op, lambda x, s, d: (torch.cat([x, x], 1), s, d, "fp8")),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_are_registered_soundly(name: str) -> None:
    op, arguments = OPS[name]
    torch.library.opcheck(op, arguments(outliers(5, 60), *layer(64, 16)))


@pytest.mark.parametrize("format_", FORMATS)
def test_fakes_have_the_shapes_and_types_of_results(format_: InputFormat) -> None:
    x, smooth, down = outliers(5, 60), *layer(64, 16)
    real = quant_down_op(x, smooth, down, format_, 0.0)
    fake = quant_down_op(*(t.to("meta") for t in (x, smooth, down)), format_, 0.0)
    for of_real, of_fake in zip(real, fake, strict=True):
        assert (of_real.shape, of_real.dtype, of_real.stride()) == (
            of_fake.shape,
            of_fake.dtype,
            of_fake.stride(),
        )


def test_compiled_code_calls_the_ops_and_gives_the_same() -> None:
    x, smooth, down = outliers(2, 5, 64), *layer(64, 16)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def model(x: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        return (
            quant_down(x[0], smooth, down, format="int4"),
            norm_quant_down(x, x[:, :1], x[:, 1:2], 1e-6, smooth, down, format="int8"),
            glu_quant_down(torch.cat([x[0], x[1]], dim=1), smooth, down, format="nvfp4"),
        )

    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend, fullgraph=True)(x)
        for got, expected in zip(compiled, model(x), strict=True):
            assert_same(Quantized(*got), expected)
    for name in OPS:
        assert any(f"gesso.{name}" in target for target in seen), name


X, LAYER = torch.zeros(3, 64), layer(64, 16, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant_down(X[None], *LAYER, format="int8"), "flatten it first"),
        (lambda: quant_down(X, *LAYER, format="int3"), "one of: int4, uint4"),
        (lambda: quant_down(X, torch.ones(65), LAYER[1], format="int8"), "multiple of 64"),
        (lambda: quant_down(torch.zeros(3, 65), *LAYER, format="int8"), "65 columns"),
        (lambda: quant_down(X, LAYER[0], LAYER[1][:, 1:], format="int8"), r"expected \[R, 64\]"),
        (lambda: quant_down(X, LAYER[0], torch.zeros(257, 64), format="int8"), "up to 256"),
        (lambda: quant_down(X.int(), *LAYER, format="int8"), "before it is quantized"),
        (lambda: quant_down_triton(X, *LAYER, format="int8"), "float16 or bfloat16"),
        (lambda: glu_quant_down(X[:, 1:], *LAYER, format="int8"), "values then gates"),
        (
            lambda: norm_quant_down(X[None], X[:1, None, 1:], X[:1, None], 0, *LAYER, format="fp8"),
            r"shift has the shape \(1, 1, 63\)",
        ),
        (lambda: norm_quant_down(X, X, X, 0, *LAYER, format="int8"), r"expected \[B, N, K\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
