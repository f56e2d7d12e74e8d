"""Depthwise 3x3 convolution over a grid of tokens, then a gated SiLU over its channels:

    m = conv3x3(x) + bias,  zeros around the grid
    y = m_a · silu(m_g)  with  m = [m_a | m_g]

Tokens are row-major and channels-last, (B, h·w, 2C); the result has C channels. The kernel keeps m
in registers: of the 2C channels that plain torch writes and reads back, none reaches memory.
"""

# B batch   N = h·w tokens   C channels of the result   E = 2C channels of the input

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.device_functions import silu
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.gated_silu import gated_silu
from gesso_kernels.triton_import import tl, triton

# A program walks down ROWS rows of a strip of COLUMNS tokens. Four channels go to a thread, so that
# its 72 taps stay in registers; STAGES rows are on their way to shared memory while one is added.
ROWS, COLUMNS, CHANNELS, STAGES, WARPS = 16, 8, 64, 3, 4


def depthwise_glu_ref(
    x_BNE: Tensor, weight_E133: Tensor, bias_E: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """The formula of this module in plain torch; differentiable."""
    return gated_silu(_convolved(x_BNE, weight_E133, bias_E, grid), dim=-1)


def _convolved(
    x_BNE: Tensor, weight_E133: Tensor, bias_E: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    batch, _, channels = x_BNE.shape
    x_BEHW = x_BNE.view(batch, *grid, channels).permute(0, 3, 1, 2)  # channels-last
    m_BEHW = F.conv2d(x_BEHW, weight_E133, bias_E, padding=1, groups=channels)
    return m_BEHW.permute(0, 2, 3, 1).flatten(1, 2)


@triton.jit
def _tap_row(at, both, known):  # type: ignore[no-untyped-def]
    left = tl.load(at, known, other=0.0).to(tl.float32)
    middle = tl.load(at + both, known, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * both, known, other=0.0).to(tl.float32)
    return left, middle, right


@triton.jit
def _taps(at, both, known):  # type: ignore[no-untyped-def]
    """The upper, middle and lower row of the 3x3 window, from weights (9, 2C)."""
    upper, middle = _tap_row(at, both, known), _tap_row(at + 3 * both, both, known)
    return upper, middle, _tap_row(at + 6 * both, both, known)


@triton.jit
def _neighbours(row, offset, x_token, has_left, keep, has_right):  # type: ignore[no-untyped-def]
    """The tokens of a row one column to the left, in place and to the right; 0 outside."""
    left = tl.load(row + (offset - x_token), has_left, other=0.0)
    middle = tl.load(row + offset, keep, other=0.0)
    right = tl.load(row + (offset + x_token), has_right, other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit
def _add_row(total, tokens, taps):  # type: ignore[no-untyped-def]
    total = tl.fma(tokens[0], taps[0], total)
    total = tl.fma(tokens[1], taps[1], total)
    return tl.fma(tokens[2], taps[2], total)


@triton.jit(do_not_specialize=["rows", "columns"])  # type: ignore[untyped-decorator]
def _depthwise_glu_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    y,
    rows,
    columns,
    channels,
    x_sample,
    x_token,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every row of tokens is loaded once and added to the three rows of results that it touches."""
    strips = tl.cdiv(columns, COLUMNS)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    column = (tl.program_id(1) % strips * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    first = tl.program_id(1) // strips * ROWS
    sample = tl.program_id(2).to(tl.int64)
    known, both = channel < channels, 2 * channels

    a0, a1, a2 = _taps(weight + channel, both, known)
    g0, g1, g2 = _taps(weight + channels + channel, both, known)
    empty_a = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    empty_g = empty_a
    if HAS_BIAS:
        empty_a += tl.load(bias + channel, known, other=0.0).to(tl.float32)
        empty_g += tl.load(bias + channels + channel, known, other=0.0).to(tl.float32)

    # Within a row 32-bit offsets are enough, and they stay the same from row to row.
    keep = known & (column < columns)
    has_left, has_right = keep & (column > 0), known & (column + 1 < columns)
    x_offset, y_offset = column * x_token + channel, column * channels + channel
    x += sample * x_sample
    y += sample * rows * columns * channels
    # Results of the current and of the next row, as far as they are added up.
    current_a, next_a, current_g, next_g = empty_a, empty_a, empty_g, empty_g
    end = tl.minimum(first + ROWS, rows)
    for row in tl.range(tl.maximum(first - 1, 0), tl.minimum(end + 1, rows), num_stages=STAGES):
        x_a = x + tl.cast(row, tl.int64) * columns * x_token
        tokens_a = _neighbours(x_a, x_offset, x_token, has_left, keep, has_right)
        tokens_g = _neighbours(x_a + channels, x_offset, x_token, has_left, keep, has_right)
        value, gate = _add_row(current_a, tokens_a, a2), _add_row(current_g, tokens_g, g2)
        current_a, current_g = _add_row(next_a, tokens_a, a1), _add_row(next_g, tokens_g, g1)
        next_a, next_g = _add_row(empty_a, tokens_a, a0), _add_row(empty_g, tokens_g, g0)
        if row > first:
            y_row = y + tl.cast(row - 1, tl.int64) * columns * channels
            tl.store(y_row + y_offset, (value * silu(gate)).to(y.dtype.element_ty), keep)
    if end == rows:  # below the last row of the grid is nothing to add
        y_row = y + tl.cast(rows - 1, tl.int64) * columns * channels
        tl.store(y_row + y_offset, (current_a * silu(current_g)).to(y.dtype.element_ty), keep)


def compile_specs() -> list[CompileSpec]:
    """The one tile that is launched."""
    integers = ("rows", "columns", "channels", "x_sample", "x_token")
    pointers = dict.fromkeys(("x", "weight", "bias", "y"), "*bf16")
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "STAGES": STAGES}
    return [
        CompileSpec(
            name="depthwise_glu",
            kernel=_depthwise_glu_kernel,
            signature={**pointers, **dict.fromkeys(integers, "i32")},
            constexprs={"HAS_BIAS": True, **tile},
            num_warps=WARPS,
            num_stages=1,
            max_registers=168,
        )
    ]


@on_its_device
def depthwise_glu_triton(
    x_BNE: Tensor, weight_E133: Tensor, bias_E: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """The kernel; x may be strided over samples and tokens."""
    batch, tokens, both = x_BNE.shape
    rows, columns = grid
    if tokens != rows * columns or both % 2 or weight_E133.shape != (both, 1, 3, 3):
        raise ValueError(
            f"tokens {tuple(x_BNE.shape)} on a grid of {rows}x{columns} with weights "
            f"{tuple(weight_E133.shape)} do not fit; expected (B, rows·columns, 2C), (2C, 1, 3, 3)"
        )
    x = x_BNE if x_BNE.stride(-1) == 1 else x_BNE.contiguous()
    y_BNC = x.new_empty(batch, tokens, both // 2)
    if not y_BNC.numel():
        return y_BNC
    tiles = triton.cdiv(columns, COLUMNS) * triton.cdiv(rows, ROWS)
    _depthwise_glu_kernel[(triton.cdiv(both // 2, CHANNELS), tiles, batch)](
        x,
        tap_major(weight_E133),
        None if bias_E is None else bias_E.contiguous(),
        y_BNC,
        rows,
        columns,
        both // 2,
        x.stride(0),
        x.stride(1),
        HAS_BIAS=bias_E is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        CHANNELS=CHANNELS,
        STAGES=STAGES,
        num_warps=WARPS,
        num_stages=1,
    )
    return y_BNC


def tap_major(weight_E133: Tensor) -> Tensor:
    """The same weight with its channels next to each other in memory, as the kernel reads them.

    Free when it is so already: a model that stays on a GPU can store its weights like this.
    """
    return weight_E133.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@torch.library.custom_op("gesso::depthwise_glu", mutates_args=())
def depthwise_glu_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    """The registered op: the kernel on CUDA, the reference elsewhere."""
    function = depthwise_glu_triton if x.is_cuda else depthwise_glu_ref
    return function(x, weight, bias, (rows, columns)).contiguous()


@depthwise_glu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2)


def depthwise_glu(
    x_BNE: Tensor, weight_E133: Tensor, bias_E: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """Depthwise 3x3 convolution with zero padding, then value half times SiLU of the gate half.

    Args:
        x_BNE: tokens of a grid, row-major, 2C channels.
        weight_E133: weight of a depthwise ``nn.Conv2d``.
        bias_E: its bias, if it has one.
        grid: rows and columns; their product is N.

    Returns:
        (B, N, C) in the dtype of x. Differentiable; with gradients it runs in plain torch.
    """
    if calls_op(x_BNE, weight_E133, bias_E):
        y_BNC: Tensor = depthwise_glu_op(x_BNE, weight_E133, bias_E, *grid)
        return y_BNC
    m_BNE = _convolved(x_BNE, weight_E133, bias_E, grid)
    del x_BNE  # a caller that keeps no name for x has its memory back before the gate
    return gated_silu(m_BNE, dim=-1)
