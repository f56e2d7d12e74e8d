"""Quantizers of weights and activations: codes, scales, and the values they stand for.

    weights       int4, groups of 64     s = T(amax / 7)             q = clamp(rne(R / s), ±7)
                  nvfp4, groups of 16    t = T(amax / 2688), s = e4m3(amax / 6 / t)
                                         q = e2m1(R / (s·t))
                  int8, per row          s = amax / 127              q = rne(R / s)
    activations   int4, uint4            s = amax / Q, stored T(s)   q = clamp(rne(h·(1/s)))
                  nvfp4                  s = e4m3(amax / 6)          q = e2m1(h / s)
                  int8, fp8, per token   s = amax / 127 or 448       q = rne(h / s)

rne rounds half to even; T is the 16-bit type. Weights divide by the *rounded* scale, as the
authors' quantizer does, and their ties go up; activations follow the arithmetic of the kernels.
"""

# M tokens   N out channels   K in channels   G groups along K

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal, NamedTuple

import torch
from gesso_kernels.number_formats import (
    E2M1_MAX,
    E4M3_MAX,
    INT4_MAX,
    INT8_MAX,
    UINT4_MAX,
    Ties,
    e2m1_codes,
    pack_consecutive,
    to_e4m3,
)
from torch import Tensor

from gesso_core.quant.record import GROUP, ActivationFormat, WeightFormat

# What the kernels can quantize an input to; a record never asks for fp8 by itself.
InputFormat = ActivationFormat | Literal["fp8"]

_EXPONENT_BITS: Final = 0x7F80_0000
_LARGEST_CODE: Final[dict[str, int]] = {"int4": INT4_MAX, "uint4": UINT4_MAX, "int8": INT8_MAX}


def quantize_int4(
    x_MK: Tensor, dtype: torch.dtype, group: int = 64, *, unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    """The authors' integer quantizer, for weights and for activations during calibration.

    Args:
        x_MK: K a multiple of ``group``.
        dtype: T, what the scale is rounded to before the division.
        group: columns that share a scale.
        unsigned: codes 0..15 (for inputs ≥ 0) instead of −7..7.

    Returns:
        Codes int8 [M, K] and scales T [M, G]; the scale of an all-zero group is 1.
    """
    largest = UINT4_MAX if unsigned else INT4_MAX
    scale = _int4_scale(x_MK, dtype, group, largest)
    groups = x_MK.float().reshape(*scale.shape, group)
    codes = (groups / scale.float()[..., None]).round().clamp(0 if unsigned else -largest, largest)
    return codes.flatten(1).to(torch.int8), scale


def _int4_scale(x_MK: Tensor, dtype: torch.dtype, group: int, largest: int) -> Tensor:
    return _one_for_zero((_amax(x_MK, group) / largest).to(dtype))


def quantize_nvfp4(
    weight_NK: Tensor, dtype: torch.dtype, group: int = 16, *, parts: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The authors' two-level FP4 quantizer for weights.

    Args:
        weight_NK: K a multiple of ``group``.
        dtype: T, what the scale of the whole tensor is rounded to.
        group: columns that share a scale.
        parts: rows of the linears that were concatenated; each gets its own tensor scale.

    Returns:
        Codes uint8 [N, K], scales float8_e4m3fn [N, G], tensor scale T [1], or [N] with ``parts``.
    """
    scale, tensor_scale = _nvfp4_scales(weight_NK, dtype, group, parts)
    step = scale.float() * tensor_scale.float()[:, None]
    groups = weight_NK.float().reshape(*scale.shape, group)
    codes = e2m1_codes(groups / step[..., None], "up")
    return codes.flatten(1), scale, tensor_scale


def _nvfp4_scales(
    weight_NK: Tensor, dtype: torch.dtype, group: int, parts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    rows = row_parts(weight_NK, parts or (weight_NK.shape[0],))
    whole = [w.abs().amax().float() / (E2M1_MAX * E4M3_MAX) for w in rows]
    tensor_scale = _one_for_zero(torch.stack(whole).to(dtype))
    if parts:
        tensor_scale = tensor_scale.repeat_interleave(
            torch.tensor(parts, device=tensor_scale.device)
        )
    exact = _amax(weight_NK, group) / E2M1_MAX / tensor_scale.float()[:, None]
    return _one_for_zero(e4m3_ties_up(exact)), tensor_scale


def row_parts(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Consecutive parts along the first axis; the sizes add up to it."""
    ends = list(accumulate(sizes))
    return [x[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def quantize_fp4_input(
    x_MK: Tensor, group: int = 16, *, ties: Ties = "even"
) -> tuple[Tensor, Tensor]:
    """FP4 with one scale per group: codes uint8 [M, K], scales float8_e4m3fn [M, G].

    The kernels round ties to even; with ties ``"up"`` this is the quantizer of the authors.
    """
    levels, scale = _fp4_input(x_MK, group, ties)
    return e2m1_codes(levels), to_e4m3(scale)


def _fp4_input(x_MK: Tensor, group: int, ties: Ties) -> "QuantizedInput":
    groups = x_MK.float().reshape(x_MK.shape[0], -1, group)
    exact = groups.abs().amax(-1) / E2M1_MAX
    scale = (e4m3_ties_up(exact) if ties == "up" else to_e4m3(exact)).float()
    # A group whose scale rounds to 0 becomes 0.
    scaled = groups / torch.where(scale > 0, scale, torch.inf)[..., None]
    return QuantizedInput(nearest_e2m1(scaled, ties).view(x_MK.shape), scale)


def nearest_e2m1(x: Tensor, ties: Ties) -> Tensor:
    """The nearest e2m1 value of every element, fp32; as `e2m1_codes`, without looking up codes."""
    x = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    # Levels are ½ apart below 2, then 1, then 2: half the power of two at or below the magnitude.
    step = (x.abs().clamp_(min=1).view(torch.int32) & _EXPONENT_BITS).view(torch.float32) / 2
    units = x / step
    nearest = units.round()
    if ties == "up":
        nearest += units - nearest == 0.5
    return nearest.mul_(step)


def e4m3_ties_up(x: Tensor) -> Tensor:
    """float8_e4m3fn of non-negative values, a tie going to the larger one, saturating at 448."""
    below = to_e4m3(x)
    above = (below.view(torch.uint8) + 1).clamp(max=0x7E).view(torch.float8_e4m3fn)
    goes_up = x.float() >= (below.float() + above.float()) / 2
    chosen = torch.where(goes_up, above.view(torch.uint8), below.view(torch.uint8))
    return chosen.view(torch.float8_e4m3fn)


def _one_for_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.float() == 0, 1.0, scale.float()).to(scale.dtype)


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The grid that a weight is rounded to: its scales are fixed before any rounding.

    Attributes:
        weight: number format.
        scale: as in `QuantizedLinear`.
        tensor_scale: as in `QuantizedLinear`.
    """

    weight: WeightFormat
    scale: Tensor
    tensor_scale: Tensor | None = None

    @classmethod
    def fit(
        cls,
        weight_NK: Tensor,
        weight: WeightFormat,
        dtype: torch.dtype,
        parts: tuple[int, ...] = (),
    ) -> "WeightGrid":
        """The grid of the absolute maxima; K must be whole groups of the format."""
        if weight == "int4":
            return cls(weight, _int4_scale(weight_NK, dtype, 64, INT4_MAX))
        if weight == "nvfp4":
            return cls(weight, *_nvfp4_scales(weight_NK, dtype, 16, parts))
        scale = weight_NK.float().abs().amax(1, keepdim=True) / INT8_MAX
        return cls(weight, _one_for_zero(scale))

    def step(self, columns: int) -> Tensor:
        """What one unit of the code is worth at every element, fp32 [N, K]."""
        step = self.scale.float()
        if self.tensor_scale is not None:
            step = step * self.tensor_scale.float()[:, None]
        return step.repeat_interleave(GROUP[self.weight] or columns, dim=1)

    def nearest(self, scaled: Tensor) -> Tensor:
        """Values in units of the step, rounded to the nearest level; fp32."""
        if self.weight == "nvfp4":
            return nearest_e2m1(scaled, "up")
        largest = _LARGEST_CODE[self.weight]
        return scaled.round().clamp(-largest, largest)

    def codes(self, levels_NK: Tensor) -> Tensor:
        """Levels as `QuantizedLinear.codes` stores them."""
        if self.weight == "int8":
            return levels_NK.to(torch.int8)
        codes = e2m1_codes(levels_NK) if self.weight == "nvfp4" else levels_NK.to(torch.int8)
        return pack_consecutive(codes)


def fake_quantize_weight(weight_NK: Tensor, weight: WeightFormat, dtype: torch.dtype) -> Tensor:
    """Quantized and back, fp32; K must be whole groups of the format."""
    grid = WeightGrid.fit(weight_NK, weight, dtype)
    step = grid.step(weight_NK.shape[1])
    return grid.nearest(weight_NK.float() / step).mul_(step)


class QuantizedInput(NamedTuple):
    """An input as a kernel sees it: ``levels · scale`` per group or per token.

    Attributes:
        levels: what the codes stand for, before the scale; fp32 [M, K].
        scale: fp32 [M, G]; G = 1 for per-token formats.
    """

    levels: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """fp32 [M, K]."""
        rows, groups = self.scale.shape
        return (self.levels.reshape(rows, groups, -1) * self.scale[..., None]).view(rows, -1)


def quantize_input(h_MK: Tensor, activation: InputFormat) -> QuantizedInput:
    """Dynamic quantization of a smoothed input with the arithmetic of the kernels (their K1).

    Args:
        h_MK: K a multiple of 64; the scales of the 4-bit integer formats are rounded to its dtype.
        activation: any format but ``"16bit"``.
    """
    if activation == "nvfp4":
        return _fp4_input(h_MK, 16, "even")
    if activation == "fp8":
        scale = _amax(h_MK, h_MK.shape[1]) / E4M3_MAX
        return QuantizedInput(to_e4m3(_divided(h_MK, scale)).float(), scale)
    if activation == "int8":
        scale = _amax(h_MK, h_MK.shape[1]) / INT8_MAX
        codes = _divided(h_MK, scale).round_().clamp_(-INT8_MAX, INT8_MAX)
        return QuantizedInput(codes, scale)
    lowest = 0 if activation == "uint4" else -INT4_MAX - 1
    largest = _LARGEST_CODE[activation]
    scale = _amax(h_MK, 64) / largest
    # The kernel multiplies by the reciprocal of the scale before its rounding to 16 bit.
    factor = torch.where(scale > 0, 1 / scale, 0)
    groups = h_MK.float().reshape(*scale.shape, -1) * factor[..., None]
    codes = groups.round_().clamp_(lowest, largest).view(h_MK.shape)
    return QuantizedInput(codes, scale.to(h_MK.dtype).float())


def fake_quantize_input(h_MK: Tensor, activation: InputFormat) -> Tensor:
    """Quantized and back, fp32 [M, K]; ``"16bit"`` changes nothing."""
    if activation == "16bit":
        return h_MK.float()
    return quantize_input(h_MK, activation).dequantized()


def _amax(h_MK: Tensor, group: int) -> Tensor:
    return h_MK.float().reshape(h_MK.shape[0], -1, group).abs().amax(-1)


def _divided(h_MK: Tensor, scale_M1: Tensor) -> Tensor:
    return torch.where(scale_M1 > 0, h_MK.float() / scale_M1, 0)
