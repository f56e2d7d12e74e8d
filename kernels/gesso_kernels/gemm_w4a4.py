"""Product of 4-bit activations and 4-bit weights, both with a scale per group of 64 columns:

    y[m, n] = act( Σ_g (Σ_{k in g} q[m, k] w[n, k]) · (s[g, m] t[g, n])  +  T(low_rank)[m] · up[n]
                   + bias[n] )

Codes are unpacked to int8 in registers; the sum inside a group is exact in int32, the sum over
groups is fp32. q is signed (−8..7) or, for inputs that were shifted to be non-negative, unsigned.
"""

# M tokens   N rows of the weight   K columns   G groups of 64   R rank

import torch
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.gemm_epilogue import (
    Activation,
    epilogue_of,
    finish_ref,
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
from gesso_kernels.number_formats import SPLIT_HALF_GROUP, unpack_split_half
from gesso_kernels.tables import Tile
from gesso_kernels.triton_import import tl, triton


def gemm_w4a4_ref(
    codes4: Tensor,
    scale_GM: Tensor,
    weight4: Tensor,
    weight_scale_GN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    unsigned: bool,
    activation: str = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula of this module; codes times scales are exact in fp32."""
    x_MK = dequantize_groups(codes4, scale_GM, signed=not unsigned)
    w_NK = dequantize_groups(weight4, weight_scale_GN, signed=True)
    return finish_ref(x_MK @ w_NK.T, low_rank_MR, up_NR, bias_N, activation, out_dtype)


def dequantize_groups(packed: Tensor, scale_GR: Tensor, *, signed: bool) -> Tensor:
    """Split-half codes [rows, K/2] times their scales [K/64, rows], fp32 [rows, K]."""
    codes = unpack_split_half(packed, signed=signed).view(*scale_GR.T.shape, SPLIT_HALF_GROUP)
    return (codes.float() * scale_GR.T.float()[..., None]).flatten(1)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _w4a4_kernel(  # type: ignore[no-untyped-def]
    codes,
    scale,
    weight,
    weight_scale,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    row_bytes,
    rank,
    UNSIGNED: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    code_base, code_line = offsets_in_tile(tile_m, tokens, row_bytes, BLOCK_M)
    weight_base, weight_line = offsets_in_tile(tile_n, rows, row_bytes, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    codes += code_base
    weight += weight_base
    token = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tokens - 1)
    row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), rows - 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, row_bytes, BLOCK_K // 2):
        x = tl.load(codes + (code_line[None, :] + byte[:, None]))
        w = tl.load(weight + (weight_line[:, None] + byte[None, :]))
        part = tl.dot(unpack_low(w, True), unpack_low(x, not UNSIGNED), out_dtype=tl.int32)
        part = tl.dot(unpack_high(w, True), unpack_high(x, not UNSIGNED), part, out_dtype=tl.int32)
        scale_m = tl.load(scale + token).to(tl.float32)
        scale_n = tl.load(weight_scale + row).to(tl.float32)
        acc += part.to(tl.float32) * (scale_n[:, None] * scale_m[None, :])
        codes += BLOCK_K // 2
        weight += BLOCK_K // 2
        scale += tokens
        weight_scale += rows
    finish_tile(
        acc, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank, RANK, HAS_BIAS, ACTIVATION
    )


@on_its_device
def gemm_w4a4_triton(
    codes4: Tensor,
    scale_GM: Tensor,
    weight4: Tensor,
    weight_scale_GN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    unsigned: bool,
    activation: str = "none",
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; ``tile`` replaces the one from the tables and has steps of 64."""
    tokens, rows, columns = codes4.shape[0], weight4.shape[0], 2 * weight4.shape[1]
    y_MN = up_NR.new_empty((tokens, rows), dtype=out_dtype)
    if not y_MN.numel():
        return y_MN
    tile = tile or tile_for("gemm_w4a4", codes4, tokens, rows, columns)
    _w4a4_kernel[(programs(tile, tokens, rows),)](
        codes4.contiguous(),
        scale_GM.contiguous(),
        weight4.contiguous(),
        weight_scale_GN.contiguous(),
        low_rank_MR.contiguous(),
        up_NR.contiguous(),
        None if bias_N is None else bias_N.contiguous(),
        y_MN,
        tokens,
        rows,
        columns // 2,
        UNSIGNED=unsigned,
        **epilogue_of(up_NR, bias_N, activation),
        **tile.launch(),
    )
    return y_MN


_SASS = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA", 121: "IMMA"}


def compile_specs() -> list[CompileSpec]:
    """Every tile of the tables, signed."""
    signature = {
        "codes": "*u8",
        "scale": "*bf16",
        "weight": "*u8",
        "weight_scale": "*bf16",
        **EPILOGUE_SIGNATURE,
        "row_bytes": "i32",
    }
    return specs_of("gemm_w4a4", _w4a4_kernel, signature, _SASS, UNSIGNED=False)


def _run(
    codes4: Tensor,
    scale_GM: Tensor,
    weight4: Tensor,
    weight_scale_GN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    unsigned: bool,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    run = gemm_w4a4_triton if codes4.is_cuda else gemm_w4a4_ref
    return run(
        codes4,
        scale_GM,
        weight4,
        weight_scale_GN,
        low_rank_MR,
        up_NR,
        bias_N,
        unsigned=unsigned,
        activation=activation,
        out_dtype=out_dtype,
    )


_op = torch.library.custom_op("gesso::gemm_w4a4", _run, mutates_args=())


@_op.register_fake
def _fake(
    codes4: Tensor,
    scale_GM: Tensor,
    weight4: Tensor,
    weight_scale_GN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    unsigned: bool,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return up_NR.new_empty((codes4.shape[0], weight4.shape[0]), dtype=out_dtype)


def gemm_w4a4(
    codes4: Tensor,
    scale_GM: Tensor,
    weight4: Tensor,
    weight_scale_GN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    unsigned: bool,
    activation: Activation = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """4-bit product, branch, bias and activation in one pass; bit-reproducible.

    Args:
        codes4: uint8 [M, K/2], split-half codes of the input.
        scale_GM: 16 bit [K/64, M].
        weight4: uint8 [N, K/2], split-half signed codes.
        weight_scale_GN: 16 bit [K/64, N].
        low_rank_MR: x · downᵀ in fp32.
        up_NR: 16 bit.
        bias_N: 16 bit or None.
        unsigned: whether the codes of the input are 0..15 instead of −8..7.
        activation: applied after the bias.
        out_dtype: of the result [M, N].

    Raises:
        ValueError: shapes that do not fit.
    """
    (rows, rank), tokens, columns = up_NR.shape, codes4.shape[0], 2 * weight4.shape[1]
    groups = columns // SPLIT_HALF_GROUP
    shapes = {
        "codes4": (codes4, (tokens, columns // 2)),
        "scale_GM": (scale_GM, (groups, tokens)),
        "weight4": (weight4, (rows, columns // 2)),
        "weight_scale_GN": (weight_scale_GN, (groups, rows)),
        "low_rank_MR": (low_rank_MR, (tokens, rank)),
        "bias_N": (bias_N, (rows,)),
    }
    require_product(columns, shapes, activation)
    quantized = (codes4, scale_GM, weight4, weight_scale_GN)
    if calls_op(*quantized, low_rank_MR, up_NR, bias_N):
        y_MN: Tensor = _op(*quantized, low_rank_MR, up_NR, bias_N, unsigned, activation, out_dtype)
        return y_MN
    return gemm_w4a4_ref(
        *quantized,
        low_rank_MR,
        up_NR,
        bias_N,
        unsigned=unsigned,
        activation=activation,
        out_dtype=out_dtype,
    )
