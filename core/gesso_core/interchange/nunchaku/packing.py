"""How the nunchaku engine lays out tensors: pack and unpack, inverse to each other.

Every layout is a mixed-radix permutation. Rows n and columns k are split into digits, and the
stored tensor holds the digits in another order, the one in which the lanes of its matrix
instruction read them. Below, ``n = (nt, a8, b2, c8)`` means ``n = 128·nt + 16·a + 8·b + c``.

    weight, 4 bit      n = (nt, a8, b2, c8)      k = (kt, d2, e4, f8)   →  nt kt a c e b d f
    weight, 8 bit      n = (nt, a8, b2, c8)      k = (kt, d2, e4, f4)   →  nt kt a c e b d f
    16-bit vector      n = (nt, p8, q2, r4, t2)  group g                →  nt g p r q t
    e4m3 scale         n = (nt, s4, a4, b8)      g = (kt, j4)           →  nt kt b a s j
    low rank, 16×16    i = (b2, c8)              j = (d2, e4, f2)       →  tile c e b d f
    4-bit AWQ weight   n = (o, i4)               k = (h, l2, u4, v8)    →  o h i l v u
    rotary table       m = (mt, x2, y8)          j = (jt, z4, t2)       →  mt jt y z x t

Nothing here knows about padding to whole tiles except `pad_to`; sizes that do not divide fail.
"""

# N output channels   K input channels   G groups along K   R rank   M tokens   D rotary channels

from collections.abc import Sequence
from typing import Final, Literal

import torch
from gesso_kernels.number_formats import pack_consecutive, unpack_consecutive
from torch import Tensor

TILE: Final = 128  # rows, and columns of a 4-bit weight, come in whole tiles
TILE_8BIT: Final = 64  # columns of an 8-bit weight
RANK_TILE: Final = 16
AWQ_GROUPS: Final = 16  # group rows of a weight-only scale

_WEIGHT = (0, 4, 1, 3, 6, 2, 5, 7)
_VECTOR = (0, 5, 1, 3, 2, 4)
_MICRO_SCALE = (0, 4, 3, 2, 1, 5)
_DOWN = (3, 0, 2, 5, 1, 4, 6)
_UP = (0, 3, 2, 5, 1, 4, 6)
_AWQ = (0, 2, 1, 3, 5, 4)
_ROTARY = (0, 1, 4, 3, 5, 2, 6)


def pad_to(x: Tensor, multiple: int, dim: int, fill: float = 0.0) -> Tensor:
    """``x`` with its dimension ``dim`` rounded up to a multiple, filled with ``fill``."""
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    filling = torch.zeros(shape) if fill == 0 else torch.full(shape, fill)
    return torch.cat([x, filling.to(x.dtype)], dim)


def pack_weight4(codes_NK: Tensor) -> Tensor:
    """Codes −8..15, N and K multiples of 128, to the W4A4 ``qweight``: int8 [N, K/2]."""
    rows, columns = codes_NK.shape
    words = _permute(codes_NK, (-1, 8, 2, 8, columns // 64, 2, 4, 8), _WEIGHT)
    return pack_consecutive(words).view(torch.int8).reshape(rows, columns // 2)


def unpack_weight4(qweight: Tensor, *, signed: bool) -> Tensor:
    """Inverse of `pack_weight4`: int8 [N, K], two's complement if ``signed``, else 0..15."""
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    codes = unpack_consecutive(qweight.contiguous().view(torch.uint8), signed=signed)
    digits = (rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    return _restore(codes, digits, _WEIGHT).reshape(rows, columns)


def pack_weight8(codes_NK: Tensor) -> Tensor:
    """int8 codes, N a multiple of 128 and K of 64, to the W8A8 ``qweight``: int8 [N, K]."""
    rows, columns = codes_NK.shape
    return _permute(codes_NK, (-1, 8, 2, 8, columns // 32, 2, 4, 4), _WEIGHT).reshape(rows, columns)


def unpack_weight8(qweight: Tensor) -> Tensor:
    """Inverse of `pack_weight8`."""
    rows, columns = qweight.shape
    digits = (rows // TILE, 8, 2, 8, columns // 32, 2, 4, 4)
    return _restore(qweight, digits, _WEIGHT).reshape(rows, columns)


def pack_scale(scale_NG: Tensor) -> Tensor:
    """16-bit group scales of an int4 weight, N a multiple of 128: stored [G, N]."""
    rows, groups = scale_NG.shape
    return _permute(scale_NG, (rows // TILE, 8, 2, 4, 2, groups), _VECTOR).reshape(groups, rows)


def unpack_scale(stored_GN: Tensor) -> Tensor:
    """Inverse of `pack_scale`: [N, G]."""
    groups, rows = stored_GN.shape
    return _restore(stored_GN, (rows // TILE, 8, 2, 4, 2, groups), _VECTOR).reshape(rows, groups)


def pack_vector(vector_N: Tensor) -> Tensor:
    """Bias, smoothing or row scales, length a multiple of 128: the layout of `pack_scale`, flat."""
    return pack_scale(vector_N[:, None]).flatten()


def unpack_vector(stored_N: Tensor) -> Tensor:
    """Inverse of `pack_vector`."""
    return unpack_scale(stored_N[None]).flatten()


def pack_micro_scale(scale_NG: Tensor) -> Tensor:
    """e4m3 scales of groups of 16, N a multiple of 128 and G of 4: stored [G, N], e4m3."""
    rows, groups = scale_NG.shape
    digits = (rows // TILE, 4, 4, 8, groups // 4, 4)
    packed = _permute(scale_NG.contiguous().view(torch.uint8), digits, _MICRO_SCALE)
    return packed.reshape(groups, rows).view(scale_NG.dtype)


def unpack_micro_scale(stored_GN: Tensor) -> Tensor:
    """Inverse of `pack_micro_scale`: [N, G]."""
    groups, rows = stored_GN.shape
    digits = (rows // TILE, 4, 4, 8, groups // 4, 4)
    scale = _restore(stored_GN.contiguous().view(torch.uint8), digits, _MICRO_SCALE)
    return scale.reshape(rows, groups).view(stored_GN.dtype)


def pack_low_rank(factor: Tensor, side: Literal["down", "up"]) -> Tensor:
    """One factor of the branch, zero-padded to whole 16×16 tiles.

    Args:
        factor: ``down`` [R, K] or ``up`` [N, R], 16 bit.
        side: which of the two it is.

    Returns:
        [K, R] or [N, R], both sizes rounded up to multiples of 16.
    """
    factor = pad_to(pad_to(factor, RANK_TILE, 0), RANK_TILE, 1)
    rows, columns = factor.shape
    packed = _permute(factor, _low_rank_digits(rows, columns), _DOWN if side == "down" else _UP)
    return packed.reshape(columns, rows) if side == "down" else packed.reshape(rows, columns)


def unpack_low_rank(stored: Tensor, side: Literal["down", "up"]) -> Tensor:
    """Inverse of `pack_low_rank`: ``down`` [R, K] or ``up`` [N, R], padding included."""
    rows, columns = stored.shape[::-1] if side == "down" else stored.shape
    order = _DOWN if side == "down" else _UP
    return _restore(stored, _low_rank_digits(rows, columns), order).reshape(rows, columns)


def _low_rank_digits(rows: int, columns: int) -> tuple[int, ...]:
    return rows // RANK_TILE, 2, 8, columns // RANK_TILE, 2, 4, 2


def pack_awq_weight(codes_NK: Tensor) -> Tensor:
    """Codes 0..15, N a multiple of 4 and K of 64, to the AWQ ``qweight``: int32 [N/4, K/2]."""
    rows, columns = codes_NK.shape
    nibbles = _permute(codes_NK, (rows // 4, 4, columns // 64, 2, 4, 8), _AWQ)
    return pack_consecutive(nibbles).flatten().view(torch.int32).reshape(rows // 4, columns // 2)


def unpack_awq_weight(qweight: Tensor) -> Tensor:
    """Inverse of `pack_awq_weight`: int8 0..15 [N, K]."""
    rows, columns = qweight.shape[0] * 4, qweight.shape[1] * 2
    nibbles = unpack_consecutive(qweight.contiguous().view(torch.uint8), signed=False)
    digits = (rows // 4, 4, columns // 64, 2, 4, 8)
    return _restore(nibbles, digits, _AWQ).reshape(rows, columns)


def pack_awq_scale(scale_NG: Tensor) -> Tensor:
    """Scales or zeros of an AWQ weight: stored [G, N], G zero-padded to a multiple of 16."""
    return pad_to(scale_NG.T.contiguous(), AWQ_GROUPS, 0)


def unpack_awq_scale(stored_GN: Tensor, groups: int) -> Tensor:
    """Inverse of `pack_awq_scale`: [N, groups]."""
    return stored_GN[:groups].T.contiguous()


def interleave_rows(x: Tensor, splits: int) -> Tensor:
    """Rows of an AdaLN layer: ``splits`` blocks of channels → the splits of one channel adjacent.

    Engine row ``c·splits + s`` is row ``s·(N/splits) + c`` of the model.
    """
    return x.reshape(splits, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def deinterleave_rows(x: Tensor, splits: int) -> Tensor:
    """Inverse of `interleave_rows`."""
    return interleave_rows(x, x.shape[0] // splits)


def pack_rotary(table_BMD: Tensor) -> Tensor:
    """Rotary table, M a multiple of 16 and D of 8: (B, M, D) in the order the engine reads."""
    batch, tokens, channels = table_BMD.shape
    digits = (batch, tokens // 16, 2, 8, channels // 8, 4, 2)
    return _permute(table_BMD, digits, _ROTARY).reshape(table_BMD.shape)


def unpack_rotary(stored_BMD: Tensor) -> Tensor:
    """Inverse of `pack_rotary`."""
    batch, tokens, channels = stored_BMD.shape
    digits = (batch, tokens // 16, 2, 8, channels // 8, 4, 2)
    return _restore(stored_BMD, digits, _ROTARY).reshape(stored_BMD.shape)


def _permute(x: Tensor, digits: Sequence[int], order: Sequence[int]) -> Tensor:
    return x.reshape(*digits).permute(*order).contiguous()


def _restore(stored: Tensor, digits: Sequence[int], order: Sequence[int]) -> Tensor:
    inverse = [order.index(axis) for axis in range(len(order))]
    return stored.reshape([digits[axis] for axis in order]).permute(*inverse).contiguous()
