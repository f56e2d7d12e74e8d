"""Product of NVFP4 activations and weights: e2m1 codes with an e4m3 scale per group of 16 columns.

    y[m, n] = act( alpha[n] · Σ_g s[m, g] t[n, g] Σ_{k in g} q[m, k] w[n, k]
                   + T(low_rank)[m] · up[n]  +  bias[n] )

The tensor core applies the scales (`tl.dot_scaled`), native from sm_100 on; the sum is fp32. alpha
is the second scale of the weight.
"""

# M tokens   N rows of the weight   K columns   G groups of 16   R rank

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
    require_arch,
    require_product,
    tile_for,
    tile_of_program,
)
from gesso_kernels.gemm_specs import EPILOGUE_SIGNATURE, specs_of
from gesso_kernels.number_formats import e2m1_values, unpack_consecutive
from gesso_kernels.tables import Tile
from gesso_kernels.triton_import import tl, triton

GROUP = 16


def gemm_nvfp4_ref(
    codes: Tensor,
    scale_MG: Tensor,
    weight: Tensor,
    weight_scale_NG: Tensor,
    alpha: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula of this module; codes times scales are exact in fp32."""
    x_MK, w_NK = dequantize_nvfp4(codes, scale_MG), dequantize_nvfp4(weight, weight_scale_NG)
    acc_MN = (x_MK @ w_NK.T) * alpha.float()
    return finish_ref(acc_MN, low_rank_MR, up_NR, bias_N, activation, out_dtype)


def dequantize_nvfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Consecutive e2m1 codes [rows, K/2] times their scales [rows, K/16], fp32 [rows, K]."""
    values = e2m1_values(unpack_consecutive(codes, signed=False)).view(*scale.shape, GROUP)
    return (values * scale.float()[..., None]).flatten(1)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _nvfp4_kernel(  # type: ignore[no-untyped-def]
    codes,
    scale,
    weight,
    weight_scale,
    alpha,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    row_bytes,
    rank,
    ALPHA_STEP: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // 16
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    groups = row_bytes // 8
    code_base, code_line = offsets_in_tile(tile_m, tokens, row_bytes, BLOCK_M)
    weight_base, weight_line = offsets_in_tile(tile_n, rows, row_bytes, BLOCK_N)
    scale_base, scale_line = offsets_in_tile(tile_m, tokens, groups, BLOCK_M)
    weight_scale_base, weight_scale_line = offsets_in_tile(tile_n, rows, groups, BLOCK_N)
    codes += code_base
    weight += weight_base
    scale += scale_base
    weight_scale += weight_scale_base
    byte, group = tl.arange(0, HALF), tl.arange(0, GROUPS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, row_bytes, HALF):
        x = tl.load(codes + (code_line[None, :] + byte[:, None]))
        w = tl.load(weight + (weight_line[:, None] + byte[None, :]))
        scale_x = tl.load(scale + (scale_line[:, None] + group[None, :]))
        scale_w = tl.load(weight_scale + (weight_scale_line[:, None] + group[None, :]))
        acc = tl.dot_scaled(w, scale_w, "e2m1", x, scale_x, "e2m1", acc)
        codes += HALF
        weight += HALF
        scale += GROUPS
        weight_scale += GROUPS
    row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), rows - 1)
    out = acc * tl.load(alpha + row * ALPHA_STEP)[:, None]
    finish_tile(
        out, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank, RANK, HAS_BIAS, ACTIVATION
    )


@on_its_device
def gemm_nvfp4_triton(
    codes: Tensor,
    scale_MG: Tensor,
    weight: Tensor,
    weight_scale_NG: Tensor,
    alpha: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; ``tile`` replaces the one from the tables.

    Raises:
        UnsupportedMode: a GPU before sm_100.
    """
    tokens, rows, columns = codes.shape[0], weight.shape[0], 2 * weight.shape[1]
    y_MN = up_NR.new_empty((tokens, rows), dtype=out_dtype)
    if not y_MN.numel():
        return y_MN
    require_arch(weight, (10, 0), "FP4 product", "w8a8_fp8 from sm_89 on and w4a16 before")
    tile = (tile or tile_for("gemm_nvfp4", codes, tokens, rows, columns)).dividing(columns)
    _nvfp4_kernel[(programs(tile, tokens, rows),)](
        codes.contiguous(),
        scale_MG.contiguous(),
        weight.contiguous(),
        weight_scale_NG.contiguous(),
        alpha.contiguous(),
        low_rank_MR.contiguous(),
        up_NR.contiguous(),
        None if bias_N is None else bias_N.contiguous(),
        y_MN,
        tokens,
        rows,
        columns // 2,
        ALPHA_STEP=int(alpha.numel() > 1),
        **epilogue_of(up_NR, bias_N, activation),
        **tile.launch(),
    )
    return y_MN


_SASS = {100: "UTCOMMA", 103: "UTCOMMA", 120: "OMMA.SF", 121: "OMMA.SF"}


def compile_specs() -> list[CompileSpec]:
    """Every tile of the tables."""
    signature = {
        "codes": "*u8",
        "scale": "*fp8e4nv",
        "weight": "*u8",
        "weight_scale": "*fp8e4nv",
        "alpha": "*fp32",
        **EPILOGUE_SIGNATURE,
        "row_bytes": "i32",
    }
    return specs_of("gemm_nvfp4", _nvfp4_kernel, signature, _SASS, ALPHA_STEP=0)


def _run(
    codes: Tensor,
    scale_MG: Tensor,
    weight: Tensor,
    weight_scale_NG: Tensor,
    alpha: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    quantized = (codes, scale_MG, weight, weight_scale_NG, alpha)
    run = gemm_nvfp4_triton if codes.is_cuda else gemm_nvfp4_ref
    return run(*quantized, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype)


_op = torch.library.custom_op("gesso::gemm_nvfp4", _run, mutates_args=())


@_op.register_fake
def _fake(
    codes: Tensor,
    scale_MG: Tensor,
    weight: Tensor,
    weight_scale_NG: Tensor,
    alpha: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return up_NR.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


def gemm_nvfp4(
    codes: Tensor,
    scale_MG: Tensor,
    weight: Tensor,
    weight_scale_NG: Tensor,
    alpha: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """NVFP4 product, branch, bias and activation in one pass; bit-reproducible.

    Args:
        codes: uint8 [M, K/2], consecutive e2m1, K a multiple of 64.
        scale_MG: e4m3 [M, K/16].
        weight: uint8 [N, K/2], consecutive e2m1.
        weight_scale_NG: e4m3 [N, K/16].
        alpha: fp32 [1] or [N].
        low_rank_MR: x · downᵀ in fp32.
        up_NR: 16 bit.
        bias_N: 16 bit or None.
        activation: applied after the bias.
        out_dtype: of the result [M, N].

    Raises:
        ValueError: shapes that do not fit.
        UnsupportedMode: a GPU before sm_100.
    """
    (rows, rank), tokens, columns = up_NR.shape, codes.shape[0], 2 * weight.shape[1]
    shapes = {
        "codes": (codes, (tokens, columns // 2)),
        "scale_MG": (scale_MG, (tokens, columns // GROUP)),
        "weight": (weight, (rows, columns // 2)),
        "weight_scale_NG": (weight_scale_NG, (rows, columns // GROUP)),
        "alpha": (alpha, (1,) if alpha.shape == (1,) else (rows,)),
        "low_rank_MR": (low_rank_MR, (tokens, rank)),
        "bias_N": (bias_N, (rows,)),
    }
    require_product(columns, shapes, activation)
    quantized = (codes, scale_MG, weight, weight_scale_NG, alpha)
    if calls_op(*quantized, low_rank_MR, up_NR, bias_N):
        y_MN: Tensor = _op(*quantized, low_rank_MR, up_NR, bias_N, activation, out_dtype)
        return y_MN
    return gemm_nvfp4_ref(
        *quantized, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype
    )
