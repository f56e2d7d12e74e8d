"""Four- and eight-bit number formats, and how 4-bit codes lie in bytes.

    int4    −8..7 (quantizers use −7..7)         uint4   0..15
    e2m1    sign and one of 0, ½, 1, 1½, 2, 3, 4, 6; code = 8·sign + index       (FP4)
    e4m3    float8_e4m3fn: largest value 448, no infinity                        (FP8)

Two layouts of codes along K: *consecutive* (the even element in the low nibble; files, NVFP4) and
*split-half* (per 64 codes: byte j holds code j low and code j + 32 high; what the kernels unpack
into two half-K products without an interleave).
"""

import math
from typing import Final, Literal

import torch
from torch import Tensor

INT4_MAX: Final = 7
UINT4_MAX: Final = 15
INT8_MAX: Final = 127
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SPLIT_HALF_GROUP: Final = 64

Ties = Literal["even", "up"]


def pack_consecutive(codes: Tensor) -> Tensor:
    """Integer codes (..., K), −8..15, to uint8 (..., K/2): the even element in the low nibble."""
    nibbles = _nibbles(codes, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack_consecutive(packed: Tensor, *, signed: bool) -> Tensor:
    """Inverse of `pack_consecutive`: int8 (..., K), two's complement if ``signed``."""
    return _signed(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2), signed)


def pack_split_half(codes: Tensor) -> Tensor:
    """Integer codes (..., K), K a multiple of 64, to uint8 (..., K/2)."""
    halves = _nibbles(codes, 2, SPLIT_HALF_GROUP // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack_split_half(packed: Tensor, *, signed: bool) -> Tensor:
    """Inverse of `pack_split_half`: int8 (..., K)."""
    half = SPLIT_HALF_GROUP // 2
    groups = packed.reshape(*packed.shape[:-1], packed.shape[-1] // half, half)
    return _signed(torch.stack([groups & 15, groups >> 4], dim=-2).flatten(-3), signed)


def _nibbles(codes: Tensor, *shape: int) -> Tensor:
    nibbles = codes.to(torch.int16).bitwise_and(15).to(torch.uint8)
    return nibbles.reshape(*codes.shape[:-1], codes.shape[-1] // math.prod(shape), *shape)


def _signed(nibbles: Tensor, signed: bool) -> Tensor:
    codes = nibbles.to(torch.int8)
    return torch.where(codes > INT4_MAX, codes - 16, codes) if signed else codes


def e2m1_codes(x: Tensor, ties: Ties = "even") -> Tensor:
    """The nearest e2m1 code of every element, uint8 0..15; beyond ±6 saturates.

    Args:
        x: any floating-point tensor.
        ties: ``"even"`` to the even mantissa, as the hardware converts; ``"up"`` towards +∞, as the
            quantizer of the SVDQuant authors rounds weights.
    """
    x = x.float()
    levels = torch.tensor(E2M1, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs()
    down = torch.bucketize(magnitude, middles)  # a tie stays below
    up = torch.bucketize(magnitude, middles, right=True)  # a tie goes above
    # Of two neighbours the one with an even index has an even mantissa.
    stays = up % 2 == 1 if ties == "even" else x < 0
    index = torch.where(stays, down, up)
    negative = torch.signbit(x) & (index > 0)
    return (index + 8 * negative).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """fp32 values of e2m1 codes 0..15."""
    levels = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return levels[codes.long()]


def to_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn, round half to even, saturating at ±448."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
