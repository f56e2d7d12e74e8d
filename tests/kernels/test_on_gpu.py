"""Every kernel on a GPU against its reference on the CPU: bf16, sizes of layers of Sana-1.6B.

The references round where the kernels do; what may differ is the last bit of quotients,
exponentials and sums, and with it a code that lies on the edge between two.
"""

# M rows   K columns, padded   N out channels   R rank

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gesso_kernels import gemm_nvfp4, gemm_w4a4, gemm_w4a8, gemm_w4a16, gemm_w8a8
from gesso_kernels.expand_w4 import (
    expand_to_rows,
    nvfp4_to_split_half,
    progressive_multipliers,
)
from gesso_kernels.glu_quant_down import glu_quant_down
from gesso_kernels.norm_quant_down import norm_quant_down
from gesso_kernels.number_formats import unpack_consecutive, unpack_split_half
from gesso_kernels.quant_down import FORMATS, InputFormat, Quantized, quant_down
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
SAMPLES, TOKENS, WIDTH = 2, 1020, 2240  # M = 2040 is not a multiple of 16
QKV = 3 * WIDTH
POINT, POINT_PADDED = 5600, 5632
RANK = 32

Arguments = tuple[Any, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def outliers(*shape: int) -> Tensor:
    """Rows whose channels have very different sizes."""
    return (normal(*shape) * torch.exp(normal(shape[-1], seed=2))).bfloat16()


def layer(columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """λ and a first half of a branch."""
    smooth = torch.exp2(normal(columns, seed=1).clamp(-2, 2))
    return smooth.bfloat16(), (normal(rank, columns) / columns**0.5).bfloat16()


def on(device: str, values: Arguments) -> Arguments:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def steps(codes: Tensor, format_: InputFormat) -> Tensor:
    """Codes as integers in the order of their values, so that neighbours differ by 1."""
    if format_ in ("int4", "uint4"):
        return unpack_split_half(codes, signed=format_ == "int4").int()
    if format_ == "int8":
        return codes.int()
    bytes_ = (
        codes.view(torch.uint8) if format_ == "fp8" else unpack_consecutive(codes, signed=False)
    )
    sign = 128 if format_ == "fp8" else 8
    magnitude = bytes_.int() & (sign - 1)
    return torch.where((bytes_.int() & sign) > 0, -magnitude, magnitude)


def assert_close(
    got: Quantized, expected: Quantized, format_: InputFormat, moved: float, scale: float
) -> None:
    """At most the share ``moved`` of the codes one step off, scales within ``scale`` of theirs."""
    off = (steps(got.codes.cpu(), format_) - steps(expected.codes, format_)).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= moved
    assert got.scale.dtype == expected.scale.dtype
    torch.testing.assert_close(
        got.scale.cpu().float(), expected.scale.float(), rtol=scale, atol=1e-30
    )
    assert relative(got.low_rank_MR, expected.low_rank_MR) <= 1e-3


def relative(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative."""
    return ((got.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("format_", FORMATS)
def test_the_quantizer_gives_the_codes_of_its_reference(format_: InputFormat) -> None:
    x = outliers(SAMPLES * TOKENS, POINT)
    arguments = (x.abs() if format_ == "uint4" else x, *layer(POINT_PADDED))
    shift = 0.171875 if format_ == "uint4" else 0.0
    expected = quant_down(*arguments, format=format_, shift=shift)
    got = quant_down(*on(GPU, arguments), format=format_, shift=shift)
    assert_close(got, expected, format_, 1e-4, 1e-6 if format_ in ("int8", "fp8") else 0)


# y may be rounded to the other bf16 neighbour, 2⁻⁷ away; e4m3 scales are 2⁻³ apart.
SCALE = dict.fromkeys(FORMATS, 2**-7) | {"nvfp4": 2**-3}


@pytest.mark.parametrize("format_", ["int4", "int8", "fp8", "nvfp4"])
def test_the_normed_quantizer_agrees_with_its_reference(format_: InputFormat) -> None:
    modulation = (normal(SAMPLES, 6, WIDTH) / 4).bfloat16()
    x = outliers(SAMPLES, TOKENS, WIDTH)
    arguments = (x, modulation[:, 1:2], modulation[:, 2:3], 1e-6, *layer(WIDTH))
    expected = norm_quant_down(*arguments, format=format_)
    got = norm_quant_down(*on(GPU, arguments), format=format_)
    assert_close(got, expected, format_, 2e-3, SCALE[format_])


@pytest.mark.parametrize("format_", ["int4", "int8", "fp8", "nvfp4"])
def test_the_gated_quantizer_agrees_with_its_reference(format_: InputFormat) -> None:
    arguments = (outliers(SAMPLES * TOKENS, 2 * POINT), *layer(POINT_PADDED))
    expected = glu_quant_down(*arguments, format=format_)
    got = glu_quant_down(*on(GPU, arguments), format=format_)
    assert_close(got, expected, format_, 2e-3, SCALE[format_])


def quantized(tokens: int, format_: InputFormat) -> Quantized:
    return quant_down(outliers(tokens, WIDTH), *layer(WIDTH), format=format_)


def second_half(rank: int = RANK) -> tuple[Tensor, Tensor]:
    """`up` and bias."""
    return (normal(QKV, rank) / 8).bfloat16(), normal(QKV).bfloat16()


def int4_weight() -> tuple[Tensor, Tensor]:
    scale = (integers(20, 100, WIDTH // 64, QKV) / 8192).bfloat16()
    return integers(0, 256, QKV, WIDTH // 2).to(torch.uint8), scale


def nvfp4_weight() -> tuple[Tensor, Tensor, Tensor]:
    scale = (integers(8, 200, QKV, WIDTH // 16) / 8).to(torch.float8_e4m3fn)
    return integers(0, 256, QKV, WIDTH // 2).to(torch.uint8), scale, torch.tensor([1 / 512])


def w8a8(tokens: int) -> Arguments:
    x = quantized(tokens, "int8")
    return (
        x.codes,
        x.scale,
        *expand_to_rows(*int4_weight(), to="int8"),
        x.low_rank_MR,
        *second_half(),
    )


def w8a8_fp8(tokens: int) -> Arguments:
    x = quantized(tokens, "fp8")
    return (
        x.codes,
        x.scale,
        *expand_to_rows(*int4_weight(), to="fp8"),
        x.low_rank_MR,
        *second_half(),
    )


def w4a8(tokens: int) -> Arguments:
    x, (weight4, scale) = quantized(tokens, "int8"), int4_weight()
    progressive = (weight4, *progressive_multipliers(weight4, scale))
    return x.codes, x.scale, *progressive, x.low_rank_MR, *second_half()


def w4a4(tokens: int) -> Arguments:
    x = quantized(tokens, "int4")
    return x.codes, x.scale, *int4_weight(), x.low_rank_MR, *second_half()


def nvfp4(tokens: int) -> Arguments:
    x = quantized(tokens, "nvfp4")
    return x.codes, x.scale, *nvfp4_weight(), x.low_rank_MR, *second_half()


def w4a16(tokens: int) -> Arguments:
    smooth, down = layer(WIDTH)
    return outliers(tokens, WIDTH), smooth, *int4_weight(), down, *second_half()


def w4a16_nvfp4(tokens: int) -> Arguments:
    (smooth, down), (codes, scale, alpha) = layer(WIDTH), nvfp4_weight()
    weight = (*nvfp4_to_split_half(codes, scale), alpha)
    return outliers(tokens, WIDTH), smooth, *weight, down, *second_half()


WIDE = {"out_dtype": torch.float32}
# Product, its arguments, options, relative error, oldest architecture.
PRODUCTS = [
    (gemm_w8a8.gemm_w8a8, w8a8, WIDE, 3e-3, (8, 0)),
    (gemm_w8a8.gemm_w8a8, w8a8_fp8, WIDE, 4e-3, (8, 9)),
    (gemm_w4a8.gemm_w4a8, w4a8, WIDE, 3e-3, (8, 0)),
    (gemm_w4a4.gemm_w4a4, w4a4, WIDE | {"unsigned": False}, 3e-3, (8, 0)),
    (gemm_w4a16.gemm_w4a16, w4a16, {}, 3e-3, (8, 0)),
    (gemm_w4a16.gemm_w4a16_nvfp4, w4a16_nvfp4, {}, 3e-3, (8, 0)),
    (gemm_nvfp4.gemm_nvfp4, nvfp4, WIDE, 3e-3, (10, 0)),
]
with_products = pytest.mark.parametrize(
    ("product", "make", "options", "tolerance", "oldest"),
    PRODUCTS,
    ids=[make.__name__ for _, make, *_ in PRODUCTS],
)


@with_products
@pytest.mark.parametrize("tokens", [SAMPLES * TOKENS, 40, 3])
def test_a_product_agrees_with_its_reference_and_repeats_bit_for_bit(
    tokens: int,
    product: Callable[..., Tensor],
    make: Callable[[int], Arguments],
    options: dict[str, Any],
    tolerance: float,
    oldest: tuple[int, int],
) -> None:
    if torch.cuda.get_device_capability() < oldest:
        pytest.skip(f"needs sm_{oldest[0]}{oldest[1]}")
    arguments = make(tokens)
    expected = product(*arguments, activation="silu", **options)
    moved, options = on(GPU, arguments), options | {"activation": "silu"}
    if "out_dtype" in options:
        options["out_dtype"] = torch.bfloat16
    got = product(*moved, **options)
    assert got.dtype == torch.bfloat16
    assert relative(got, expected) <= tolerance
    assert torch.equal(product(*moved, **options), got)


def test_a_graph_replays_what_was_captured() -> None:
    x, (smooth, down) = outliers(200, WIDTH).to(GPU), on(GPU, layer(WIDTH))
    _, _, weight, row_scale, _, up, bias = on(GPU, w8a8(1))

    def run() -> Tensor:
        q = quant_down(x, smooth, down, format="int8")
        return gemm_w8a8.gemm_w8a8(
            *q[:2], weight, row_scale, q.low_rank_MR, up, bias, out_dtype=torch.bfloat16
        )

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(outliers(201, WIDTH)[1:])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run())


def test_neither_new_numbers_of_tokens_nor_new_ranks_compile_anew() -> None:
    codes, scale, weight, row_scale, low_rank, up, bias = on(GPU, w8a8(60))

    def run(tokens: int, rank: int) -> None:
        branch = (low_rank[:tokens, :rank], up[:, :rank])
        gemm_w8a8.gemm_w8a8(
            codes[:tokens], scale[:tokens], weight, row_scale, *branch, bias, out_dtype=up.dtype
        )

    built = gemm_w8a8._w8a8_kernel.device_caches[torch.cuda.current_device()][0]
    run(17, 20)
    run(18, 32)
    before = len(built)
    for tokens, rank in ((48, 20), (33, 28), (60, 32), (59, 31)):
        run(tokens, rank)
    assert len(built) == before


def test_gradients_flow_through_the_branch() -> None:
    *weight, low_rank, up, bias = on(GPU, w8a8(20))
    up = up.requires_grad_()
    gemm_w8a8.gemm_w8a8(*weight, low_rank, up, bias, out_dtype=up.dtype).sum().backward()
    assert up.grad is not None
    assert up.grad.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    arguments = (outliers(40, WIDTH), *layer(WIDTH))
    with torch.cuda.device(0):
        got = quant_down(*on("cuda:1", arguments), format="int8")
    assert_close(got, quant_down(*arguments, format="int8"), "int8", 1e-4, 1e-6)
