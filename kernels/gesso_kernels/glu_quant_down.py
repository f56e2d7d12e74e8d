"""K1c: the gate of a GLU, then the quantizer and the branch of K1, in one pass over memory.

    y        = T( value · silu(gate) )          [value | gate] = x, T its dtype
    codes, scale, low_rank  as `quant_down` gives them for y

Gate and product are in fp32 and y is rounded once. Sana's point convolution reads its input so.
"""

# M rows   K columns, padded   R rank

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.device_functions import silu
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.quant_down import quant_down_ref
from gesso_kernels.quantize_rows import quantize_block
from gesso_kernels.quantized_input import (
    BLOCK_M,
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


def glu_quant_down_ref(
    x_M2K: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """The formulas of this module in plain torch; x may be float32 too."""
    value, gate = x_M2K.float().chunk(2, dim=1)
    y_MK = (F.silu(gate) * value).to(x_M2K.dtype)
    return quant_down_ref(y_MK, smooth_K, down_RK, format=format)


STEP: Final = 128  # two inputs per column: more of them would not fit the registers


@triton.jit
def _tile(source, columns):  # type: ignore[no-untyped-def]
    x, row_starts, keep, width = source
    place = x + row_starts[:, None] + columns[None, :]
    inside = keep[:, None] & (columns < width)[None, :]
    value = tl.load(place, inside, other=0.0).to(tl.float32)
    gate = tl.load(place + width, inside, other=0.0).to(tl.float32)
    return (value * silu(gate)).to(x.dtype.element_ty)


@triton.jit  # type: ignore[untyped-decorator]
def _glu_quant_down_kernel(  # type: ignore[no-untyped-def]
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
    """Every format, at the usual rank."""
    tensors = {"x": "*bf16", "smooth": "*bf16", "down": "*bf16"}
    integers = ("M", "K", "width", "rank", "x_stride")
    formats: tuple[InputFormat, ...] = ("int4", "int8", "fp8", "nvfp4")
    return [
        block_spec(
            "glu_quant_down", _glu_quant_down_kernel, tensors, integers, format_, 32, step=STEP
        )
        for format_ in formats
    ]


@on_its_device
def glu_quant_down_triton(
    x_M2K: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """Launch the kernel on 16-bit tensors; same results as the reference."""
    require_16bit(x_M2K)
    (rank, columns), rows = down_RK.shape, x_M2K.shape[0]
    out = empty_outputs(x_M2K, rows, columns, rank, format)
    settings = launch(format, rank, step=STEP)
    x = rows_contiguous(x_M2K)
    if rows:
        _glu_quant_down_kernel[(triton.cdiv(rows, BLOCK_M),)](
            x,
            smooth_K.to(x.dtype).contiguous(),
            down_RK.to(x.dtype).contiguous(),
            *(bytes_view(tensor) for tensor in out),
            rows,
            columns,
            x.shape[1] // 2,
            rank,
            x.stride(0),
            **settings.constants,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
        )
    return out


@torch.library.custom_op("gesso::glu_quant_down", mutates_args=())
def glu_quant_down_op(
    x: Tensor, smooth: Tensor, down: Tensor, code_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: the kernel on CUDA, the reference elsewhere."""
    function: Callable[..., Quantized] = glu_quant_down_triton if x.is_cuda else glu_quant_down_ref
    return function(x, smooth, down, format=code_format)


@glu_quant_down_op.register_fake
def _(x: Tensor, smooth: Tensor, down: Tensor, code_format: str) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(x, x.shape[0], smooth.shape[0], down.shape[0], code_format)


def glu_quant_down(
    x_M2K: Tensor,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """Codes, scales and the first half of the branch of value · silu(gate).

    Args:
        x_M2K: values, then gates, along the last axis; 16 bit, float32 on the CPU. Either may have
            fewer columns than K, the others count as 0.
        smooth_K: λ, K a multiple of 64.
        down_RK: with 1/λ folded in; R from 0 to 256.
        format: number format of the codes.

    Raises:
        ValueError: shapes, dtypes or format do not fit.
    """
    if x_M2K.ndim != 2 or x_M2K.shape[1] % 2:
        raise ValueError(
            f"x has the shape {tuple(x_M2K.shape)}, expected [M, 2K], values then gates"
        )
    require_fitting(x_M2K, x_M2K.shape[1] // 2, smooth_K, down_RK, format)
    if calls_op(x_M2K, smooth_K, down_RK):
        return Quantized(*glu_quant_down_op(x_M2K, smooth_K, down_RK, format))
    return glu_quant_down_ref(x_M2K, smooth_K, down_RK, format=format)
