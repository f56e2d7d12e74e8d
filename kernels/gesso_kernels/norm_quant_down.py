"""K1b: LayerNorm without affine map and modulation, then K1, without writing the normed tokens.

    y        = T( (x − mean(x)) / sqrt(var(x) + eps) · (1 + scale) + shift )      T: dtype of x
    codes, scale, low_rank  as `quant_down` gives them for the tokens of all samples

Mean and variance are over the columns that x has. Everything before T is in fp32.
"""

# B samples   N tokens   K columns, padded   R rank   M = B·N rows

from collections.abc import Callable

import torch
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.modulated_norm import modulated_norm_ref
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


def norm_quant_down_ref(
    x_BNK: Tensor,
    shift_B1K: Tensor,
    scale_B1K: Tensor,
    eps: float,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """The formulas of this module in plain torch; x may be float32 too."""
    y_BNK = modulated_norm_ref(x_BNK.float(), shift_B1K.float(), scale_B1K.float(), eps)
    y_MK = y_BNK.to(x_BNK.dtype).flatten(0, 1)
    return quant_down_ref(y_MK, smooth_K, down_RK, format=format)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(x, row_starts, keep, width, eps, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and 1/sqrt(var + eps) of each row, [BLOCK_M].

    Tiles are merged by their own means (Chan, Golub, LeVeque 1979): one pass, and no difference of
    two large sums when a row lies far from 0.
    """
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, 128):
        columns = start + tl.arange(0, 128)
        inside = keep[:, None] & (columns < width)[None, :]
        v = tl.load(x + row_starts[:, None] + columns[None, :], inside, other=0.0).to(tl.float32)
        count = tl.minimum(width - start, 128).to(tl.float32)
        tile_mean = tl.sum(v, axis=1) / count
        centered = tl.where(inside, v - tile_mean[:, None], 0.0)
        difference = tile_mean - mean
        weight = count / (start + count)
        mean += difference * weight
        squares += tl.sum(centered * centered, axis=1) + difference * difference * start * weight
    return mean, tl.rsqrt(squares / width + eps)


@triton.jit
def _tile(source, columns):  # type: ignore[no-untyped-def]
    x, row_starts, keep, width, mean, rstd, mod_shift, mod_scale = source
    real = columns < width
    inside = keep[:, None] & real[None, :]
    v = tl.load(x + row_starts[:, None] + columns[None, :], inside, other=0.0).to(tl.float32)
    gain = 1.0 + tl.load(mod_scale + columns, real, other=0.0).to(tl.float32)
    offset = tl.load(mod_shift + columns, real, other=0.0).to(tl.float32)
    y = (v - mean[:, None]) * rstd[:, None] * gain[None, :] + offset[None, :]
    return tl.where(inside, y, 0.0).to(x.dtype.element_ty)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_quant_down_kernel(  # type: ignore[no-untyped-def]
    x, mod_shift, mod_scale, smooth, down, codes, scale, low_rank,
    M, N, K, width, rank, x_sample, x_token, shift_sample, scale_sample, eps,
    FORMAT: tl.constexpr, SHIFT: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program stays in one sample, so shift and scale are vectors.
    sample = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = tokens < N
    row_starts = sample * x_sample + tokens * x_token
    mean, rstd = _statistics(x, row_starts, keep, width, eps, BLOCK_M)
    source = (
        x, row_starts, keep, width, mean, rstd,
        mod_shift + sample * shift_sample, mod_scale + sample * scale_sample,
    )  # fmt: skip
    quantize_block(
        _tile, source, sample * N + tokens, keep, smooth, down, codes, scale, low_rank,
        M, K, width, rank, FORMAT, SHIFT, RANK, BLOCK_M, BLOCK_K,
    )  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """Every format, at the usual rank."""
    names = ("x", "mod_shift", "mod_scale", "smooth", "down")
    tensors = dict.fromkeys(names, "*bf16") | {"eps": "fp32"}
    integers = ("M", "N", "K", "width", "rank", "x_sample", "x_token")
    formats: tuple[InputFormat, ...] = ("int4", "int8", "fp8", "nvfp4")
    return [
        block_spec(
            "norm_quant_down",
            _norm_quant_down_kernel,
            tensors,
            (*integers, "shift_sample", "scale_sample"),
            format_,
            32,
        )
        for format_ in formats
    ]


@on_its_device
def norm_quant_down_triton(
    x_BNK: Tensor,
    shift_B1K: Tensor,
    scale_B1K: Tensor,
    eps: float,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """Launch the kernel on 16-bit tensors; x may be strided over samples and tokens."""
    require_16bit(x_BNK)
    (batch, tokens, width), (rank, columns) = x_BNK.shape, down_RK.shape
    out = empty_outputs(x_BNK, batch * tokens, columns, rank, format)
    settings = launch(format, rank)
    x = rows_contiguous(x_BNK)
    shift, scale = (
        rows_contiguous(tensor.expand(batch, 1, width)) for tensor in (shift_B1K, scale_B1K)
    )
    if batch * tokens:
        _norm_quant_down_kernel[(triton.cdiv(tokens, BLOCK_M), batch)](
            x,
            shift,
            scale,
            smooth_K.to(x.dtype).contiguous(),
            down_RK.to(x.dtype).contiguous(),
            *(bytes_view(tensor) for tensor in out),
            batch * tokens,
            tokens,
            columns,
            width,
            rank,
            x.stride(0),
            x.stride(1),
            shift.stride(0),
            scale.stride(0),
            eps,
            **settings.constants,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
        )
    return out


@torch.library.custom_op("gesso::norm_quant_down", mutates_args=())
def norm_quant_down_op(
    x: Tensor,
    mod_shift: Tensor,
    mod_scale: Tensor,
    eps: float,
    smooth: Tensor,
    down: Tensor,
    code_format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: the kernel on CUDA, the reference elsewhere."""
    function: Callable[..., Quantized] = (
        norm_quant_down_triton if x.is_cuda else norm_quant_down_ref
    )
    return function(x, mod_shift, mod_scale, eps, smooth, down, format=code_format)


@norm_quant_down_op.register_fake
def _(
    x: Tensor,
    mod_shift: Tensor,
    mod_scale: Tensor,
    eps: float,
    smooth: Tensor,
    down: Tensor,
    code_format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    return empty_outputs(x, rows, smooth.shape[0], down.shape[0], code_format)


def norm_quant_down(
    x_BNK: Tensor,
    shift_B1K: Tensor,
    scale_B1K: Tensor,
    eps: float,
    smooth_K: Tensor,
    down_RK: Tensor,
    *,
    format: InputFormat,  # noqa: A002
) -> Quantized:
    """Codes, scales and the first half of the branch of normed and modulated tokens.

    Args:
        x_BNK: tokens; 16 bit, float32 on the CPU. May have fewer columns than K, the others count
            as 0 after the norm.
        shift_B1K: offset of each sample, or of all (B = 1); as many columns as x.
        scale_B1K: gain of each sample less one, or of all.
        eps: added to the variance.
        smooth_K: λ, K a multiple of 64.
        down_RK: with 1/λ folded in; R from 0 to 256.
        format: number format of the codes.

    Returns:
        Rows are the tokens of the first sample, then of the second, and so on.

    Raises:
        ValueError: shapes, dtypes or format do not fit.
    """
    _require_modulation(x_BNK, shift_B1K, scale_B1K)
    require_fitting(x_BNK, x_BNK.shape[-1], smooth_K, down_RK, format)
    arguments = (x_BNK, shift_B1K, scale_B1K, eps, smooth_K, down_RK)
    if calls_op(x_BNK, shift_B1K, scale_B1K, smooth_K, down_RK):
        return Quantized(*norm_quant_down_op(*arguments, format))
    return norm_quant_down_ref(*arguments, format=format)


def _require_modulation(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has the shape {tuple(x.shape)}, expected [B, N, K]")
    each, one = (x.shape[0], 1, x.shape[2]), (1, 1, x.shape[2])
    for name, tensor in (("shift", shift), ("scale", scale)):
        if tuple(tensor.shape) not in (each, one):
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, expected {each}, or {one} for all "
                "samples at once"
            )
