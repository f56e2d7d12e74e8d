"""Product of 8-bit activations and 4-bit weights whose group scales are small integers:

    w8[n, k] = code[n, k] · g[k // 64, n]             (|w8| below 128: int8, made in registers)
    y[m, n]  = act( (Σ_k q[m, k] w8[n, k]) · s[m] · t[n]  +  T(low_rank)[m] · up[n]  +  bias[n] )

The sum runs over all K in int32, as with weights expanded to int8, but the weights stay 4-bit in
memory. g and t come from `expand_w4.progressive_multipliers`.
"""

# M tokens   N rows of the weight   K columns   G groups of 64   R rank

import torch
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.gemm_epilogue import (
    Activation,
    epilogue_of,
    finish_tile,
    offsets_in_tile,
    programs,
    require_product,
    tile_for,
    tile_of_program,
    unpack_high,
    unpack_low,
)
from gesso_kernels.gemm_specs import EPILOGUE_SIGNATURE, specs_of
from gesso_kernels.gemm_w8a8 import gemm_w8a8_ref
from gesso_kernels.number_formats import SPLIT_HALF_GROUP, unpack_split_half
from gesso_kernels.tables import Tile
from gesso_kernels.triton_import import tl, triton


def gemm_w4a8_ref(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight4: Tensor,
    multipliers_GN: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula of this module; sums are exact."""
    codes_NGC = unpack_split_half(weight4, signed=True).view(weight4.shape[0], -1, SPLIT_HALF_GROUP)
    weight_NK = (codes_NGC * multipliers_GN.T[..., None]).flatten(1)
    scaled = (codes_MK, scale_M, weight_NK, row_scale_N)
    return gemm_w8a8_ref(
        *scaled, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype
    )


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _w4a8_kernel(  # type: ignore[no-untyped-def]
    codes,
    scale,
    weight,
    multipliers,
    row_scale,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    row_bytes,
    rank,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    code_base, code_line = offsets_in_tile(tile_m, tokens, 2 * row_bytes, BLOCK_M)
    weight_base, weight_line = offsets_in_tile(tile_n, rows, row_bytes, BLOCK_N)
    column = tl.arange(0, HALF)
    codes += code_base
    weight += weight_base
    row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), rows - 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for _ in range(0, row_bytes, HALF):
        at = code_line[None, :] + column[:, None]
        x_low, x_high = tl.load(codes + at), tl.load(codes + HALF + at)
        packed = tl.load(weight + (weight_line[:, None] + column[None, :]))
        multiplier = tl.load(multipliers + row)[:, None]
        acc = tl.dot(unpack_low(packed, True) * multiplier, x_low, acc, out_dtype=tl.int32)
        acc = tl.dot(unpack_high(packed, True) * multiplier, x_high, acc, out_dtype=tl.int32)
        codes += BLOCK_K
        weight += HALF
        multipliers += rows
    token = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tokens - 1)
    scale_m, scale_n = tl.load(scale + token), tl.load(row_scale + row)
    out = acc.to(tl.float32) * scale_m[None, :] * scale_n[:, None]
    finish_tile(
        out, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank, RANK, HAS_BIAS, ACTIVATION
    )


@on_its_device
def gemm_w4a8_triton(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight4: Tensor,
    multipliers_GN: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; ``tile`` replaces the one from the tables and has steps of 64."""
    (tokens, columns), rows = codes_MK.shape, weight4.shape[0]
    y_MN = codes_MK.new_empty((tokens, rows), dtype=out_dtype)
    if not y_MN.numel():
        return y_MN
    tile = tile or tile_for("gemm_w4a8", codes_MK, tokens, rows, columns)
    _w4a8_kernel[(programs(tile, tokens, rows),)](
        codes_MK.contiguous(),
        scale_M.contiguous(),
        weight4.contiguous(),
        multipliers_GN.contiguous(),
        row_scale_N.contiguous(),
        low_rank_MR.contiguous(),
        up_NR.contiguous(),
        None if bias_N is None else bias_N.contiguous(),
        y_MN,
        tokens,
        rows,
        columns // 2,
        **epilogue_of(up_NR, bias_N, activation),
        **tile.launch(),
    )
    return y_MN


_SASS = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA", 121: "IMMA"}


def compile_specs() -> list[CompileSpec]:
    """Every tile of the tables."""
    signature = {
        "codes": "*i8",
        "scale": "*fp32",
        "weight": "*u8",
        "multipliers": "*i8",
        "row_scale": "*fp32",
        **EPILOGUE_SIGNATURE,
        "row_bytes": "i32",
    }
    return specs_of("gemm_w4a8", _w4a8_kernel, signature, _SASS)


def _run(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight4: Tensor,
    multipliers_GN: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    quantized = (codes_MK, scale_M, weight4, multipliers_GN, row_scale_N)
    run = gemm_w4a8_triton if codes_MK.is_cuda else gemm_w4a8_ref
    return run(*quantized, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype)


_op = torch.library.custom_op("gesso::gemm_w4a8", _run, mutates_args=())


@_op.register_fake
def _fake(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight4: Tensor,
    multipliers_GN: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes_MK.new_empty((codes_MK.shape[0], weight4.shape[0]), dtype=out_dtype)


def gemm_w4a8(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight4: Tensor,
    multipliers_GN: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """Progressive product, branch, bias and activation in one pass; bit-reproducible.

    Args:
        codes_MK: int8.
        scale_M: fp32, of every token.
        weight4: uint8 [N, K/2], split-half signed codes.
        multipliers_GN: int8 [K/64, N].
        row_scale_N: fp32, of every row.
        low_rank_MR: x · downᵀ in fp32.
        up_NR: 16 bit.
        bias_N: 16 bit or None.
        activation: applied after the bias.
        out_dtype: of the result [M, N].

    Raises:
        ValueError: shapes that do not fit.
    """
    (tokens, columns), (rows, rank) = codes_MK.shape, up_NR.shape
    shapes = {
        "scale_M": (scale_M, (tokens,)),
        "weight4": (weight4, (rows, columns // 2)),
        "multipliers_GN": (multipliers_GN, (columns // SPLIT_HALF_GROUP, rows)),
        "row_scale_N": (row_scale_N, (rows,)),
        "low_rank_MR": (low_rank_MR, (tokens, rank)),
        "bias_N": (bias_N, (rows,)),
    }
    require_product(columns, shapes, activation)
    quantized = (codes_MK, scale_M, weight4, multipliers_GN, row_scale_N)
    if calls_op(*quantized, low_rank_MR, up_NR, bias_N):
        y_MN: Tensor = _op(*quantized, low_rank_MR, up_NR, bias_N, activation, out_dtype)
        return y_MN
    return gemm_w4a8_ref(
        *quantized, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype
    )
