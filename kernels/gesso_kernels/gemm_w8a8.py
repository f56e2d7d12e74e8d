"""Product of 8-bit activations and 8-bit weights with SVDQuant's low-rank branch in its epilogue:

    y[m, n] = act( (Σ_k q[m, k] w[n, k]) · s[m] · t[n]  +  T(low_rank)[m] · up[n]  +  bias[n] )

q and w are int8, summed exactly in int32 (K below 133 000), or both e4m3, summed in fp32. s is the
scale of a token, t that of a row of the weight, both fp32: nothing is rescaled inside the sum.
"""

# M tokens   N rows of the weight   K columns   R rank

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
from gesso_kernels.tables import Tile
from gesso_kernels.triton_import import tl, triton

# 1024 products of at most 127² add up to less than 2²⁴: fp32 sums them without rounding.
_EXACT_COLUMNS = 1024


def gemm_w8a8_ref(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight_NK: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula of this module; int8 sums are exact."""
    product = integer_product if weight_NK.dtype == torch.int8 else _float_product
    acc_MN = product(codes_MK, weight_NK) * scale_M[:, None] * row_scale_N
    return finish_ref(acc_MN, low_rank_MR, up_NR, bias_N, activation, out_dtype)


def integer_product(codes_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ: the exact sums, rounded once to fp32 [M, N]."""
    sums_MN = codes_MK.new_zeros(len(codes_MK), len(weight_NK), dtype=torch.int32)
    for start in range(0, codes_MK.shape[1], _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        sums_MN += (codes_MK[:, part].float() @ weight_NK[:, part].float().T).to(torch.int32)
    return sums_MN.float()


def _float_product(codes_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return codes_MK.float() @ weight_NK.float().T


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _w8a8_kernel(  # type: ignore[no-untyped-def]
    codes,
    scale,
    weight,
    row_scale,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    columns,
    rank,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    code_base, code_line = offsets_in_tile(tile_m, tokens, columns, BLOCK_M)
    weight_base, weight_line = offsets_in_tile(tile_n, rows, columns, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    codes += code_base
    weight += weight_base
    INTEGER: tl.constexpr = weight.dtype.element_ty == tl.int8
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    for _ in range(0, columns, BLOCK_K):
        x = tl.load(codes + (code_line[None, :] + k[:, None]))
        w = tl.load(weight + (weight_line[:, None] + k[None, :]))
        if INTEGER:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            # Hopper sums FP8 products with about 14 bits; move them to fp32 after every step.
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
        codes += BLOCK_K
        weight += BLOCK_K
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_m = tl.load(scale + token, token < tokens, 0.0)
    scale_n = tl.load(row_scale + row, row < rows, 0.0)
    out = acc.to(tl.float32) * scale_m[None, :] * scale_n[:, None]
    finish_tile(
        out, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank, RANK, HAS_BIAS, ACTIVATION
    )


@on_its_device
def gemm_w8a8_triton(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight_NK: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; ``tile`` replaces the one from the tables."""
    (tokens, columns), rows = codes_MK.shape, weight_NK.shape[0]
    y_MN = codes_MK.new_empty((tokens, rows), dtype=out_dtype)
    if not y_MN.numel():
        return y_MN
    name = "gemm_w8a8_int8"
    if weight_NK.dtype != torch.int8:
        name = "gemm_w8a8_fp8"
        require_arch(weight_NK, (8, 9), "FP8 product", "w8a8_int8 for INT4 and w4a16 for NVFP4")
    tile = (tile or tile_for(name, codes_MK, tokens, rows, columns)).dividing(columns)
    _w8a8_kernel[(programs(tile, tokens, rows),)](
        codes_MK.contiguous(),
        scale_M.contiguous(),
        weight_NK.contiguous(),
        row_scale_N.contiguous(),
        low_rank_MR.contiguous(),
        up_NR.contiguous(),
        None if bias_N is None else bias_N.contiguous(),
        y_MN,
        tokens,
        rows,
        columns,
        **epilogue_of(up_NR, bias_N, activation),
        **tile.launch(),
    )
    return y_MN


_INTEGER_SASS = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
_FP8_SASS = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 103: "UTCQMMA", 120: "QMMA"}


def compile_specs() -> list[CompileSpec]:
    """Both number formats with every tile of the tables."""
    integer = {
        "codes": "*i8",
        "scale": "*fp32",
        "weight": "*i8",
        "row_scale": "*fp32",
        **EPILOGUE_SIGNATURE,
        "columns": "i32",
    }
    fp8 = integer | {"codes": "*fp8e4nv", "weight": "*fp8e4nv"}
    return specs_of("gemm_w8a8_int8", _w8a8_kernel, integer, _INTEGER_SASS) + specs_of(
        "gemm_w8a8_fp8", _w8a8_kernel, fp8, _FP8_SASS
    )


def _run(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight_NK: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    scaled = (codes_MK, scale_M, weight_NK, row_scale_N)
    run = gemm_w8a8_triton if codes_MK.is_cuda else gemm_w8a8_ref
    return run(*scaled, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype)


_op = torch.library.custom_op("gesso::gemm_w8a8", _run, mutates_args=())


@_op.register_fake
def _fake(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight_NK: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes_MK.new_empty((codes_MK.shape[0], weight_NK.shape[0]), dtype=out_dtype)


def gemm_w8a8(
    codes_MK: Tensor,
    scale_M: Tensor,
    weight_NK: Tensor,
    row_scale_N: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    out_dtype: torch.dtype,
) -> Tensor:
    """8-bit product, branch, bias and activation in one pass; bit-reproducible.

    Args:
        codes_MK: int8 or float8_e4m3fn, the format of the weight.
        scale_M: fp32, of every token.
        weight_NK: int8 or float8_e4m3fn, K a multiple of 64.
        row_scale_N: fp32, of every row.
        low_rank_MR: x · downᵀ in fp32.
        up_NR: 16 bit.
        bias_N: 16 bit or None.
        activation: applied after the bias.
        out_dtype: of the result [M, N].

    Raises:
        ValueError: shapes that do not fit, formats that differ.
        UnsupportedMode: FP8 on a GPU before sm_89.
    """
    (tokens, columns), (rows, rank) = codes_MK.shape, up_NR.shape
    shapes = {
        "scale_M": (scale_M, (tokens,)),
        "weight_NK": (weight_NK, (rows, columns)),
        "row_scale_N": (row_scale_N, (rows,)),
        "low_rank_MR": (low_rank_MR, (tokens, rank)),
        "bias_N": (bias_N, (rows,)),
    }
    require_product(columns, shapes, activation)
    if codes_MK.dtype != weight_NK.dtype:
        raise ValueError(
            f"codes are {codes_MK.dtype} and the weight is {weight_NK.dtype}; quantize the input "
            "to the format of the weight"
        )
    scaled = (codes_MK, scale_M, weight_NK, row_scale_N)
    if calls_op(*scaled, low_rank_MR, up_NR, bias_N):
        y_MN: Tensor = _op(*scaled, low_rank_MR, up_NR, bias_N, activation, out_dtype)
        return y_MN
    return gemm_w8a8_ref(
        *scaled, low_rank_MR, up_NR, bias_N, activation=activation, out_dtype=out_dtype
    )
