"""What every quantized product does after its sum over K, and how its tiles are ordered:

    y = act( acc + T(low_rank) · upᵀ + bias )

T is the 16-bit type of ``up``; acc, branch and bias are added in fp32 and y is rounded once. The
kernels hold accᵀ, rows of the weight along the first axis: unpacked 4-bit weights then stay in
registers as the first operand of the tensor core.
"""

# M tokens   N rows of the weight   K columns   R rank   S parts of a split K

from functools import cache, lru_cache
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.device_functions import gelu_tanh, silu
from gesso_kernels.dispatch import compiled_rank
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.tables import Tile, lookup_tile
from gesso_kernels.triton_import import tl, triton

Activation = Literal["none", "silu", "gelu_tanh"]
ACTIVATIONS: Final[tuple[str, ...]] = get_args(Activation)
COLUMNS_MULTIPLE: Final = 64
_INTERPRETER_TILE: Final = Tile(block_m=32, block_n=64, block_k=64, warps=4, stages=1)


def finish_ref(
    acc_MN: Tensor,
    low_rank_MR: Tensor,
    up_NR: Tensor,
    bias_N: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula of this module on an fp32 ``acc_MN``."""
    y_MN = acc_MN + low_rank_MR.to(up_NR.dtype).float() @ up_NR.float().T
    if bias_N is not None:
        y_MN = y_MN + bias_N.float()
    if activation == "silu":
        y_MN = F.silu(y_MN)
    elif activation == "gelu_tanh":
        y_MN = F.gelu(y_MN, approximate="tanh")
    return y_MN.to(out_dtype)


def require_product(
    columns: int,
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    activation: str,
) -> None:
    """Raise `ValueError` unless every tensor has its shape and K is whole groups of 64.

    Args:
        columns: K.
        shapes: by argument name: the tensor (None where it was left out) and its expected shape.
        activation: one of `ACTIVATIONS`.
    """
    if columns % COLUMNS_MULTIPLE or not columns:
        raise ValueError(
            f"K is {columns}; the kernels need a multiple of {COLUMNS_MULTIPLE}: pad the weight "
            "with codes 0, smooth with 1 and down with 0"
        )
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {expected}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def require_arch(like: Tensor, oldest: tuple[int, int], what: str, best: str) -> None:
    """Raise `UnsupportedMode` if ``like`` is on a GPU before ``oldest``.

    Args:
        like: any tensor of the product.
        oldest: compute capability that has ``what``.
        what: the product in words.
        best: the mode to use instead.
    """
    if like.is_cuda and (arch := _arch_and_cores(like.get_device())[0]) < oldest:
        raise UnsupportedMode(
            f"sm_{arch[0]}{arch[1]} has no {what}, which needs sm_{oldest[0]}{oldest[1]} or newer; "
            f"use the mode {best}"
        )


def tile_for(kernel: str, like: Tensor, tokens: int, rows: int, columns: int) -> Tile:
    """The tile from the table of the device of ``like``, its ``block_k`` a divisor of K."""
    if not like.is_cuda:
        return _INTERPRETER_TILE.dividing(columns)
    return _tile_on(*_arch_and_cores(like.get_device()), kernel, tokens, rows, columns)


@cache
def _arch_and_cores(device: int) -> tuple[tuple[int, int], int]:
    facts = torch.cuda.get_device_properties(device)
    return (facts.major, facts.minor), facts.multi_processor_count


@lru_cache(maxsize=4096)
def _tile_on(
    arch: tuple[int, int], cores: int, kernel: str, tokens: int, rows: int, columns: int
) -> Tile:
    return lookup_tile(kernel, arch, tokens, rows).filling(tokens, rows, cores).dividing(columns)


def epilogue_of(
    up_NR: Tensor, bias_N: Tensor | None, activation: str
) -> dict[str, int | bool | str]:
    """Keyword arguments of a launch for `finish_tile`."""
    rank = up_NR.shape[1]
    return {
        "rank": rank,
        "RANK": compiled_rank(rank),
        "HAS_BIAS": bias_N is not None,
        "ACTIVATION": activation,
    }


def programs(tile: Tile, tokens: int, rows: int) -> int:
    """Tiles that cover [M, N]."""
    return int(triton.cdiv(tokens, tile.block_m) * triton.cdiv(rows, tile.block_n))


@triton.jit  # type: ignore[untyped-decorator]
def tile_of_program(tokens, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(token tile, row tile) of this program, in bands of 8 token tiles that share rows in L2."""
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    band = 8 * tl.cdiv(rows, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // band * 8
    height = tl.minimum(tiles_m - first_m, 8)
    return first_m + program % band % height, program % band // height


@triton.jit  # type: ignore[untyped-decorator]
def offsets_in_tile(tile, count, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(int64 offset of the tile's first line, int32 offsets of its lines from there).

    Lines beyond ``count`` point at the last line again, so that loads need no mask. One 64-bit base
    beside 32-bit offsets takes half the registers of 64-bit offsets.
    """
    first = tile * BLOCK
    line = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)
    return first.to(tl.int64) * stride, line * stride


@triton.jit  # type: ignore[untyped-decorator]
def finish_tile(  # type: ignore[no-untyped-def]
    acc,
    low_rank,
    up,
    bias,
    y,
    tile_m,
    tile_n,
    tokens,
    rows,
    rank,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Branch, bias, activation and store of one fp32 tile ``acc`` [BLOCK_N, BLOCK_M].

    RANK is `compiled_rank` of ``rank``.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    CHUNK: tl.constexpr = 16 if RANK <= 16 else 32
    low_base, low_line = offsets_in_tile(tile_m, tokens, rank, BLOCK_M)
    up_base, up_line = offsets_in_tile(tile_n, rows, rank, BLOCK_N)
    for start in tl.range(0, RANK, CHUNK, num_stages=1):
        r = start + tl.arange(0, CHUNK)
        up_tile = tl.load(up + up_base + up_line[:, None] + r[None, :], (r < rank)[None, :], 0.0)
        low_at = low_rank + low_base + low_line[None, :] + r[:, None]
        low_tile = tl.load(low_at, (r < rank)[:, None], 0.0)
        acc = tl.dot(up_tile, low_tile.to(up.dtype.element_ty), acc)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(bias + row, row < rows, 0.0).to(tl.float32)[:, None]
    if ACTIVATION == "silu":
        acc = silu(acc)
    elif ACTIVATION == "gelu_tanh":
        acc = gelu_tanh(acc)
    y_base, y_line = offsets_in_tile(tile_m, tokens, rows, BLOCK_M)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    y_at = y + y_base + y_line[:, None] + row[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def finish_parts_kernel(  # type: ignore[no-untyped-def]
    parts,
    low_rank,
    up,
    bias,
    y,
    tokens,
    rows,
    rank,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the fp32 partial products [S, M, N] of a split K in their order, then `finish_tile`."""
    tile_m, tile_n = tile_of_program(tokens, rows, BLOCK_M, BLOCK_N)
    base, line = offsets_in_tile(tile_m, tokens, rows, BLOCK_M)
    row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), rows - 1)
    at = parts + base + line[None, :] + row[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for part in range(PARTS):
        acc += tl.load(at + tl.cast(part, tl.int64) * tokens * rows)
    finish_tile(
        acc, low_rank, up, bias, y, tile_m, tile_n, tokens, rows, rank, RANK, HAS_BIAS, ACTIVATION
    )


@triton.jit  # type: ignore[untyped-decorator]
def unpack_low(packed, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low nibbles of uint8 ``packed`` as int8, two's complement if SIGNED."""
    return (packed.to(tl.int8, bitcast=True) << 4) >> 4 if SIGNED else (packed & 15).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def unpack_high(packed, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The high nibbles of uint8 ``packed`` as int8, two's complement if SIGNED."""
    return packed.to(tl.int8, bitcast=True) >> 4 if SIGNED else (packed >> 4).to(tl.int8)
