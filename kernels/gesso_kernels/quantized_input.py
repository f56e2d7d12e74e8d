"""What K1, K1b and K1c share on the host: formats, outputs, argument checks, launch settings."""

# M rows   K columns, padded   R rank

from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gesso_kernels.compile_spec import ARCHS, POINTERS, CompileSpec
from gesso_kernels.dispatch import compiled_rank

InputFormat = Literal["int4", "uint4", "int8", "fp8", "nvfp4"]
FORMATS: Final[tuple[str, ...]] = get_args(InputFormat)
MAX_RANK: Final = 256


class Quantized(NamedTuple):
    """A quantized input.

    Attributes:
        codes: int4, uint4: uint8 [M, K/2], split-half; nvfp4: uint8 [M, K/2], consecutive;
            int8, fp8: int8 or float8_e4m3fn [M, K].
        scale: int4, uint4: dtype of x, [K/64, M]; nvfp4: float8_e4m3fn [M, K/16];
            int8, fp8: float32 [M].
        low_rank_MR: float32.
    """

    codes: Tensor
    scale: Tensor
    low_rank_MR: Tensor


class Launch(NamedTuple):
    """How one of the kernels is launched.

    Attributes:
        constants: its constexpr arguments.
        num_warps: warps of one program.
        num_stages: tiles in flight.
    """

    constants: dict[str, object]
    num_warps: int
    num_stages: int


BLOCK_M: Final = 16  # the least that matrix units take: M = 2048 then fills 128 programs
BLOCK_K: Final = 256  # on an H200, 1.2 times as fast as 128 and as 512


def launch(code_format: str, rank: int, shift: float = 0.0, step: int = BLOCK_K) -> Launch:
    """Launch settings for a format and rank; ``step`` is for formats that scale whole rows."""
    wide = rank > 64
    whole_rows = code_format in ("int8", "fp8")
    constants = {
        "FORMAT": code_format,
        "SHIFT": shift,
        "RANK": compiled_rank(rank),
        "BLOCK_M": BLOCK_M,
        "BLOCK_K": step if whole_rows and not wide else 64,
    }
    stages = 2 if code_format == "fp8" else 3  # a third one spills on sm_120
    return Launch(constants, num_warps=4 if whole_rows or wide else 2, num_stages=stages)


def empty_outputs(like: Tensor, rows: int, columns: int, rank: int, code_format: str) -> Quantized:
    """Outputs for that many rows and padded columns, on the device of ``like``.

    The scales of int4 and uint4 have the dtype of ``like``.
    """
    whole_rows = code_format in ("int8", "fp8")
    codes_type = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(code_format, torch.uint8)
    codes = like.new_empty(rows, columns if whole_rows else columns // 2, dtype=codes_type)
    if whole_rows:
        scale = like.new_empty(rows, dtype=torch.float32)
    elif code_format == "nvfp4":
        scale = like.new_empty(rows, columns // 16, dtype=torch.float8_e4m3fn)
    else:
        scale = like.new_empty(columns // 64, rows)
    return Quantized(codes, scale, like.new_empty(rows, rank, dtype=torch.float32))


def bytes_view(x: Tensor) -> Tensor:
    """e4m3 tensors as uint8, as the kernels encode them by arithmetic; others unchanged."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last axis has gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_16bit(x: Tensor) -> None:
    """Raise ValueError unless a kernel can take x."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"x is {x.dtype}, the kernel takes float16 or bfloat16; convert the model with .to(...)"
        )


def require_fitting(
    x: Tensor, width: int, smooth_K: Tensor, down_RK: Tensor, code_format: str
) -> None:
    """Raise ValueError, saying what to do, unless the arguments of K1, K1b or K1c fit together.

    Args:
        x: the input.
        width: columns that the quantizer gets from it.
        smooth_K: λ.
        down_RK: first half of the branch.
        code_format: one of `FORMATS`.
    """
    if code_format not in FORMATS:
        raise ValueError(f"unknown input format {code_format!r}; one of: {', '.join(FORMATS)}")
    K = smooth_K.shape[-1]
    if smooth_K.ndim != 1 or K % 64 or not 0 < width <= K:
        raise ValueError(
            f"{width} columns come from x and smooth has the shape {tuple(smooth_K.shape)}; smooth "
            "must be [K], K a multiple of 64 and not below the columns: pad smooth with ones"
        )
    if down_RK.ndim != 2 or down_RK.shape[1] != K or down_RK.shape[0] > MAX_RANK:
        raise ValueError(
            f"down has the shape {tuple(down_RK.shape)}, expected [R, {K}] with R up to "
            f"{MAX_RANK}; pad its columns with zeros, and load fewer LoRAs at a time"
        )
    if not (x.is_floating_point() and smooth_K.is_floating_point() and down_RK.is_floating_point()):
        raise ValueError(
            f"x is {x.dtype}, smooth {smooth_K.dtype} and down {down_RK.dtype}; expected floating "
            "point: give x before it is quantized, and the tensors of the layer's record"
        )


def block_spec(
    name: str,
    kernel: Any,
    tensors: dict[str, str],
    integers: tuple[str, ...],
    code_format: InputFormat,
    rank: int,
    shift: float = 0.0,
    step: int = BLOCK_K,
) -> CompileSpec:
    """Compile spec of one variant of K1, K1b or K1c in bfloat16.

    Args:
        name: of the kernel.
        kernel: the ``@triton.jit`` function.
        tensors: Triton types of its inputs.
        integers: its i32 arguments.
        code_format: constexpr FORMAT.
        rank: ranks of the branch.
        shift: constexpr SHIFT.
        step: see `launch`.
    """
    out = empty_outputs(torch.empty(0, dtype=torch.bfloat16), 0, 64, rank, code_format)
    pointers = {
        field: POINTERS[str(bytes_view(tensor).dtype).removeprefix("torch.")]
        for field, tensor in zip(("codes", "scale", "low_rank"), out, strict=True)
    }
    settings = launch(code_format, rank, shift, step)
    return CompileSpec(
        name=f"{name}-{code_format}-r{rank}" + ("-shift" if shift else ""),
        kernel=kernel,
        signature=tensors | pointers | dict.fromkeys(integers, "i32"),
        constexprs=settings.constants,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        expects=dict.fromkeys(ARCHS, "HMMA") if rank else None,
        max_registers=168,
    )
