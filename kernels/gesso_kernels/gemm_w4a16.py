"""Product of 16-bit activations and 4-bit weights, for few tokens: reading the weights is the cost.

    w[n, k] = T( code[n, k] · scale[group of k, n] )          A[m, k] = T( x[m, k] / λ[k] )
    y[m, n] = act( α[n] Σ_k A[m, k] w[n, k]  +  T(x · downᵀ)[m] · up[n]  +  bias[n] )

T is the 16-bit type of x; sums are fp32. INT4 has one scale per 64 columns and no α; NVFP4 has e4m3
scales per 16 columns and the second scale α. With few tiles, several programs share the sum over
K of one tile; their parts are added in a fixed order.
"""

# M tokens   N rows of the weight   K columns   G groups   R rank   S parts of a split K

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.gemm_epilogue import (
    Activation,
    epilogue_of,
    finish_parts_kernel,
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
from gesso_kernels.gemm_specs import EPILOGUE_SIGNATURE, finish_specs_of, specs_of
from gesso_kernels.number_formats import SPLIT_HALF_GROUP, e2m1_values, unpack_split_half
from gesso_kernels.quantized_input import require_16bit
from gesso_kernels.tables import Tile
from gesso_kernels.triton_import import tl, triton

_NVFP4_GROUP: Final = 16


def gemm_w4a16_ref(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    alpha: Tensor | None,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
) -> Tensor:
    """The formula of this module; e2m1 codes where there is an ``alpha``, else int4."""
    x_MK = _padded(x_MK, smooth_K)
    w_NK = dequantize_rows(weight4, scale_GN, x_MK.dtype, e2m1=alpha is not None)
    acc_MN = (x_MK / smooth_K.to(x_MK.dtype)).float() @ w_NK.float().T
    if alpha is not None:
        acc_MN = acc_MN * alpha.float()
    low_rank_MR = x_MK.float() @ down_RK.float().T
    return finish_ref(acc_MN, low_rank_MR, up_NR, bias_N, activation, x_MK.dtype)


def dequantize_rows(weight4: Tensor, scale_GN: Tensor, dtype: torch.dtype, *, e2m1: bool) -> Tensor:
    """Split-half codes [N, K/2] times their scales, rounded once to ``dtype`` [N, K]."""
    codes = unpack_split_half(weight4, signed=not e2m1)
    values = e2m1_values(codes) if e2m1 else codes.float()
    groups_NGC = values.view(weight4.shape[0], scale_GN.shape[0], -1)
    return (groups_NGC * scale_GN.float().T[..., None]).flatten(1).to(dtype)


def _padded(x_MK: Tensor, smooth_K: Tensor) -> Tensor:
    missing = smooth_K.shape[0] - x_MK.shape[1]
    return F.pad(x_MK, (0, missing)) if missing else x_MK


@triton.jit  # type: ignore[untyped-decorator]
def _scale_e2m1(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    # Sign, exponent and mantissa move to where fp16 has them; exponent biases differ by 14. The
    # scale, e4m3 bytes of positive numbers, likewise, by 8. Products need 6 bits: all is exact.
    ROWS: tl.constexpr = code.shape[0]
    COLUMNS: tl.constexpr = code.shape[1]
    bits = ((code & 8).to(tl.int16) << 12) | ((code & 7).to(tl.int16) << 9)
    factor = (scale.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 4194304.0
    values = bits.to(tl.float16, bitcast=True).to(tl.float32)
    grouped = tl.reshape(values, [ROWS, COLUMNS // 16, 16]) * factor[:, :, None]
    return tl.reshape(grouped, [ROWS, COLUMNS]).to(dtype)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _w4a16_kernel(  # type: ignore[no-untyped-def]
    x,
    smooth,
    weight,
    scale,
    alpha,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    row_bytes,
    rank,
    NVFP4: tl.constexpr,
    ALPHA_STEP: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With PARTS above 1, ``y`` is fp32 [PARTS, M, N] and takes the bare partial sums."""
    HALF: tl.constexpr = BLOCK_K // 2
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    x_base, x_line = offsets_in_tile(tile_m, tokens, 2 * row_bytes, BLOCK_M)
    weight_base, weight_line = offsets_in_tile(tile_n, rows, row_bytes, BLOCK_N)
    row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), rows - 1)
    column = tl.arange(0, HALF)
    groups = row_bytes // HALF
    part = tl.program_id(1)
    first, last = groups * part // PARTS, groups * (part + 1) // PARTS
    x += x_base
    weight += weight_base
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in range(first, last):
        k = group * BLOCK_K
        at = k + x_line[None, :] + column[:, None]
        lambda_low, lambda_high = tl.load(smooth + k + column), tl.load(smooth + k + HALF + column)
        x_low = tl.load(x + at).to(tl.float32) / lambda_low.to(tl.float32)[:, None]
        x_high = tl.load(x + HALF + at).to(tl.float32) / lambda_high.to(tl.float32)[:, None]
        packed = tl.load(weight + group * HALF + (weight_line[:, None] + column[None, :]))
        if NVFP4:
            pair = tl.arange(0, 2)
            scale_at = scale + (4 * group + pair)[None, :] * rows + row[:, None]
            w_low = _scale_e2m1(unpack_low(packed, False), tl.load(scale_at), dtype)
            w_high = _scale_e2m1(unpack_high(packed, False), tl.load(scale_at + 2 * rows), dtype)
        else:
            scale_n = tl.load(scale + group * rows + row).to(dtype)[:, None]
            w_low = unpack_low(packed, True).to(dtype) * scale_n
            w_high = unpack_high(packed, True).to(dtype) * scale_n
        acc = tl.dot(w_low, x_low.to(dtype), acc)
        acc = tl.dot(w_high, x_high.to(dtype), acc)
    if NVFP4:
        acc *= tl.load(alpha + row * ALPHA_STEP)[:, None]
    if PARTS > 1:
        y += part.to(tl.int64) * tokens * rows
        finish_tile(acc, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, 0, 0, False, "none")
    else:
        finish_tile(
            acc, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank,
            RANK, HAS_BIAS, ACTIVATION,
        )  # fmt: skip


@on_its_device
def gemm_w4a16_triton(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    alpha: Tensor | None,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernels; ``tile`` replaces the one from the tables and has steps of 64."""
    require_16bit(x_MK)
    x_MK = _padded(x_MK, smooth_K).contiguous()
    (tokens, columns), rows = x_MK.shape, weight4.shape[0]
    y_MN = x_MK.new_empty((tokens, rows))
    if not y_MN.numel():
        return y_MN
    name = "gemm_w4a16" if alpha is None else "gemm_w4a16_nvfp4"
    tile = tile or tile_for(name, x_MK, tokens, rows, columns)
    parts = min(tile.split_k, columns // SPLIT_HALF_GROUP)
    y_SMN = y_MN if parts == 1 else y_MN.new_empty((parts, tokens, rows), dtype=torch.float32)
    scale = scale_GN if alpha is None else scale_GN.view(torch.uint8)
    bias = None if bias_N is None else bias_N.contiguous()
    branch = (F.linear(x_MK, down_RK.to(x_MK.dtype)), up_NR.contiguous(), bias)
    epilogue = epilogue_of(up_NR, bias_N, activation)
    _w4a16_kernel[(programs(tile, tokens, rows), parts)](
        x_MK,
        smooth_K.to(x_MK.dtype).contiguous(),
        weight4.contiguous(),
        scale.contiguous(),
        None if alpha is None else alpha.contiguous(),
        *branch,
        y_SMN,
        tokens,
        rows,
        columns // 2,
        NVFP4=alpha is not None,
        ALPHA_STEP=int(alpha is not None and alpha.numel() > 1),
        PARTS=parts,
        **epilogue,
        **tile.launch(),
    )
    if parts > 1:
        finish_parts_kernel[(programs(tile, tokens, rows),)](
            y_SMN,
            *branch,
            y_MN,
            tokens,
            rows,
            PARTS=parts,
            **epilogue,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.warps,
        )
    return y_MN


_SASS = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}


def compile_specs() -> list[CompileSpec]:
    """Both number formats with every tile of the tables, and the sum of the parts."""
    int4 = {
        "x": "*bf16",
        "smooth": "*bf16",
        "weight": "*u8",
        "scale": "*bf16",
        "alpha": "*fp32",
        **EPILOGUE_SIGNATURE,
        "low_rank": "*bf16",
        "row_bytes": "i32",
    }
    nvfp4 = int4 | {"scale": "*u8"}
    finish = {"parts": "*fp32"} | EPILOGUE_SIGNATURE | {"low_rank": "*bf16"}
    products = specs_of("gemm_w4a16", _w4a16_kernel, int4, _SASS, NVFP4=False, ALPHA_STEP=0)
    products += specs_of("gemm_w4a16_nvfp4", _w4a16_kernel, nvfp4, _SASS, NVFP4=True, ALPHA_STEP=0)
    return products + finish_specs_of("gemm_w4a16", finish_parts_kernel, finish)


def _run(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    alpha: Tensor | None,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
) -> Tensor:
    weight = (weight4, scale_GN, alpha)
    run = gemm_w4a16_triton if x_MK.is_cuda else gemm_w4a16_ref
    return run(x_MK, smooth_K, *weight, down_RK, up_NR, bias_N, activation=activation)


_op = torch.library.custom_op("gesso::gemm_w4a16", _run, mutates_args=())


@_op.register_fake
def _fake(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    alpha: Tensor | None,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], weight4.shape[0]))


def gemm_w4a16(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
) -> Tensor:
    """INT4 weights, 16-bit inputs: product, branch, bias and activation; bit-reproducible.

    Args:
        x_MK: 16 bit; columns beyond its own count as 0.
        smooth_K: λ, of x's dtype, K a multiple of 64.
        weight4: uint8 [N, K/2], split-half signed codes.
        scale_GN: 16 bit [K/64, N].
        down_RK: of x's dtype, 1/λ folded in.
        up_NR: of x's dtype.
        bias_N: 16 bit or None.
        activation: applied after the bias.

    Returns:
        [M, N] of x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    _require(
        x_MK, smooth_K, weight4, scale_GN, SPLIT_HALF_GROUP, down_RK, up_NR, bias_N, activation
    )
    weight = (weight4, scale_GN, None)
    return _call(x_MK, smooth_K, weight, down_RK, up_NR, bias_N, activation)


def gemm_w4a16_nvfp4(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    alpha: Tensor,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
) -> Tensor:
    """`gemm_w4a16` for an NVFP4 weight, for GPUs without an FP4 product.

    Args:
        x_MK: 16 bit; columns beyond its own count as 0.
        smooth_K: λ, of x's dtype, K a multiple of 64.
        weight4: uint8 [N, K/2], split-half e2m1 codes, from `expand_w4.nvfp4_to_split_half`.
        scale_GN: e4m3 [K/16, N], from the same.
        alpha: fp32 [1] or [N].
        down_RK: of x's dtype, 1/λ folded in.
        up_NR: of x's dtype.
        bias_N: 16 bit or None.
        activation: applied after the bias.

    Returns:
        [M, N] of x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    _require(x_MK, smooth_K, weight4, scale_GN, _NVFP4_GROUP, down_RK, up_NR, bias_N, activation)
    if alpha.shape not in ((1,), weight4.shape[:1]):
        raise ValueError(f"alpha has the shape {tuple(alpha.shape)}, expected (1,) or one per row")
    weight = (weight4, scale_GN, alpha)
    return _call(x_MK, smooth_K, weight, down_RK, up_NR, bias_N, activation)


def _call(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
) -> Tensor:
    if calls_op(x_MK, down_RK, up_NR, bias_N):
        y_MN: Tensor = _op(x_MK, smooth_K, *weight, down_RK, up_NR, bias_N, activation)
        return y_MN
    return gemm_w4a16_ref(x_MK, smooth_K, *weight, down_RK, up_NR, bias_N, activation=activation)


def _require(
    x_MK: Tensor,
    smooth_K: Tensor,
    weight4: Tensor,
    scale_GN: Tensor,
    group: int,
    down_RK: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
) -> None:
    columns, (rows, rank) = smooth_K.shape[0], up_NR.shape
    if x_MK.shape[1] > columns:
        raise ValueError(f"x has {x_MK.shape[1]} columns, the weight only {columns}")
    shapes = {
        "weight4": (weight4, (rows, columns // 2)),
        "scale_GN": (scale_GN, (columns // group, rows)),
        "down_RK": (down_RK, (rank, columns)),
        "bias_N": (bias_N, (rows,)),
    }
    require_product(columns, shapes, activation)
