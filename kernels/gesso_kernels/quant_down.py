"""K1: quantize the input of a layer and take the first half of its low-rank branch, reading x once.

    h         = (x + shift) / λ
    codes     = h on its grid, scaled by the largest |h| of its group or row
    low_rank  = x · downᵀ             the raw x, as 1/λ is folded into down; summed in fp32

Q, groups and scales per format; T is the dtype of x, ⌊·⌉ rounds half to even:

    int4    64 columns     h in T;  s = max|h| / 7,  ⌊h · (1/s)⌉ in −8..7;  stored scale T(s)
    uint4   64 columns     the same with 15 and 0..15
    nvfp4   16 columns     h in T;  s = e4m3(max|h| / 6),  codes nearest e2m1 of h / s
    int8    whole rows     h in fp32;  s = max|h| / 127,  ⌊h / s⌉
    fp8     whole rows     h in fp32;  s = max|h| / 448,  e4m3(h / s)

The 4-bit formats repeat the arithmetic of the engine that SVDQuant files were made for, both steps
of h rounded to T and the factor taken from the scale before rounding. All-zero groups and rows get
codes and scale 0.
"""

# M rows   K columns, padded   G groups   R rank

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.number_formats import E2M1_MAX, E4M3_MAX, INT4_MAX, INT8_MAX, UINT4_MAX, to_e4m3
from gesso_kernels.quantize_rows import quantize_block
from gesso_kernels.quantized_input import (
    BLOCK_M,
    FORMATS,
    MAX_RANK,
    InputFormat,
    Quantized,
    block_spec,
    bytes_view,
    empty_outputs,
    launch,
    require_16bit,
    require_fitting,
    rows_contiguous,
)
from gesso_kernels.triton_import import tl, triton

__all__ = ["FORMATS", "InputFormat", "Quantized", "quant_down", "quant_down_ref"]

_SMALLEST_NORMAL: Final = torch.finfo(torch.float32).smallest_normal


def quant_down_ref(
    x_MK: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
    shift: float = 0.0,
) -> Quantized:
    """The formulas of this module in plain torch; x may be float32 too."""
    columns = x_MK.shape[1]
    smooth_K, down_RK = smooth_K.to(x_MK.dtype), down_RK.to(x_MK.dtype)
    low_rank_MR = x_MK.float() @ down_RK[:, :columns].float().mT
    if format in ("int8", "fp8"):
        h_MK = x_MK.float() + shift if shift else x_MK.float()
        h_MK = h_MK * smooth_K[:columns].float().reciprocal()
    else:
        h_MK = (x_MK + shift if shift else x_MK) / smooth_K[:columns]
    h_MK = torch.nn.functional.pad(h_MK, (0, smooth_K.shape[0] - columns))
    codes, scale = _QUANTIZERS[format](h_MK)
    return Quantized(codes, scale, low_rank_MR)


def _int4_ref(h_MK: Tensor, limit: int, lowest: int) -> tuple[Tensor, Tensor]:
    h_MGC = h_MK.view(h_MK.shape[0], h_MK.shape[1] // 64, 64)
    s_MG = h_MGC.abs().amax(-1).float() / limit
    # The reciprocal of a subnormal s may be infinite; such groups count as zeros.
    factor_MG = torch.where(s_MG > _SMALLEST_NORMAL, s_MG.reciprocal(), 0.0)
    q_MGC = (h_MGC.float() * factor_MG[..., None]).round_().clamp_(lowest, limit).to(torch.int8)
    q_MGC = q_MGC.view(torch.uint8)
    codes = (q_MGC[..., :32] & 15).bitwise_or_(q_MGC[..., 32:] << 4).flatten(1)
    # reshape(-1) first: of one group, the transpose already counts as contiguous.
    return codes, s_MG.to(h_MK.dtype).mT.reshape(-1).view(s_MG.shape[1], s_MG.shape[0])


def _nvfp4_ref(h_MK: Tensor) -> tuple[Tensor, Tensor]:
    h_MGC = h_MK.view(h_MK.shape[0], h_MK.shape[1] // 16, 16)
    scale_MG = to_e4m3(h_MGC.abs().amax(-1).float() / E2M1_MAX)
    s_MG = scale_MG.float()
    s_MG = s_MG.masked_fill_(s_MG == 0, torch.inf)  # an infinite scale makes all codes 0
    q_MGC = _e2m1(h_MGC.float() / s_MG[..., None])
    return (q_MGC[..., 0::2] | q_MGC[..., 1::2] << 4).flatten(1), scale_MG


def _e2m1(x: Tensor) -> Tensor:
    """`number_formats.e2m1_codes` at a tenth of its time: the steps are ½ up to 2, 1 up to 4, 2."""
    to_2 = x.clamp(-2, 2)
    beyond_2 = x - to_2
    to_4 = beyond_2.clamp(-2, 2)
    to_6 = beyond_2.sub_(to_4).clamp_(-2, 2)
    # Each part is exact and the even levels meet at 2 and 4, so ties fall as in one rounding.
    index = to_2.mul_(2).round_().add_(to_4.round_()).add_(to_6.mul_(0.5).round_()).to(torch.int8)
    sign = (index >> 4).bitwise_and_(8)
    return index.abs().bitwise_or_(sign).view(torch.uint8)


def _row_ref(h_MK: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    s_M = h_MK.abs().amax(-1) / limit
    scaled_MK = h_MK.div_(s_M.masked_fill(s_M == 0, 1.0)[:, None])
    if limit == E4M3_MAX:
        return to_e4m3(scaled_MK), s_M
    return scaled_MK.round_().clamp_(-limit, limit).to(torch.int8), s_M


_QUANTIZERS: Final[dict[InputFormat, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int4": lambda h_MK: _int4_ref(h_MK, INT4_MAX, -8),
    "uint4": lambda h_MK: _int4_ref(h_MK, UINT4_MAX, 0),
    "nvfp4": _nvfp4_ref,
    "int8": lambda h_MK: _row_ref(h_MK, INT8_MAX),
    "fp8": lambda h_MK: _row_ref(h_MK, E4M3_MAX),
}


@triton.jit
def _tile(source, columns):  # type: ignore[no-untyped-def]
    x, row_starts, keep, width = source
    inside = keep[:, None] & (columns < width)[None, :]
    return tl.load(x + row_starts[:, None] + columns[None, :], inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _quant_down_kernel(  # type: ignore[no-untyped-def]
    x, smooth, down, codes, scale, low_rank, M, K, width, rank, x_stride,
    FORMAT: tl.constexpr, SHIFT: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = rows < M
    source = (x, rows * x_stride, keep, width)
    quantize_block(
        _tile, source, rows, keep, smooth, down, codes, scale, low_rank, M, K, width, rank,
        FORMAT, SHIFT, RANK, BLOCK_M, BLOCK_K,
    )  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """Every format, without branch, with a shift, and with the widest branch."""
    tensors = {"x": "*bf16", "smooth": "*bf16", "down": "*bf16"}
    integers = ("M", "K", "width", "rank", "x_stride")
    variants: list[tuple[InputFormat, int, float]] = [
        ("int4", 0, 0.0),
        ("int4", 32, 0.0),
        ("int4", MAX_RANK, 0.0),
        ("uint4", 32, 0.171875),
        ("int8", 0, 0.0),
        ("int8", 32, 0.0),
        ("int8", 32, 0.171875),
        ("int8", MAX_RANK, 0.0),
        ("fp8", 32, 0.0),
        ("nvfp4", 32, 0.0),
        ("nvfp4", MAX_RANK, 0.0),
    ]
    return [
        block_spec("quant_down", _quant_down_kernel, tensors, integers, *variant)
        for variant in variants
    ]


@on_its_device
def quant_down_triton(
    x_MK: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
    shift: float = 0.0,
) -> Quantized:
    """Launch the kernel on 16-bit tensors; same results as the reference."""
    require_16bit(x_MK)
    (rows, width), (rank, columns) = x_MK.shape, down_RK.shape
    out = empty_outputs(x_MK, rows, columns, rank, format)
    settings = launch(format, rank, shift)
    x = rows_contiguous(x_MK)
    if rows:
        _quant_down_kernel[(triton.cdiv(rows, BLOCK_M),)](
            x,
            smooth_K.to(x.dtype).contiguous(),
            down_RK.to(x.dtype).contiguous(),
            *(bytes_view(tensor) for tensor in out),
            rows,
            columns,
            width,
            rank,
            x.stride(0),
            **settings.constants,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
        )
    return out


@torch.library.custom_op("gesso::quant_down", mutates_args=())
def quant_down_op(
    x: Tensor, smooth: Tensor, down: Tensor, code_format: str, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: the kernel on CUDA, the reference elsewhere."""
    function: Callable[..., Quantized] = quant_down_triton if x.is_cuda else quant_down_ref
    return function(x, smooth, down, format=code_format, shift=shift)


@quant_down_op.register_fake
def _(
    x: Tensor, smooth: Tensor, down: Tensor, code_format: str, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(x, x.shape[0], smooth.shape[0], down.shape[0], code_format)


def quant_down(
    x_MK: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
    shift: float = 0.0,
) -> Quantized:
    """Codes, scales and the first half of the branch of the input of one layer.

    Args:
        x_MK: 16 bit; float32 on the CPU. May have fewer columns than K, the others count as 0.
        smooth_K: λ, K a multiple of 64.
        down_RK: with 1/λ folded in; R from 0 to 256.
        format: number format of the codes.
        shift: added to x for the codes, not for the branch.

    Raises:
        ValueError: shapes, dtypes or format do not fit.
    """
    if x_MK.ndim != 2:
        raise ValueError(f"x has the shape {tuple(x_MK.shape)}, expected [M, K]: flatten it first")
    require_fitting(x_MK, x_MK.shape[1], smooth_K, down_RK, format)
    if calls_op(x_MK, smooth_K, down_RK):
        return Quantized(*quant_down_op(x_MK, smooth_K, down_RK, format, shift))
    return quant_down_ref(x_MK, smooth_K, down_RK, format=format, shift=shift)
