"""The mode ``reference``: the arithmetic of `reference`, made quick for a CPU.

    y = [ Q(h) | x · downᵀ ] · [ R | up ]ᵀ + bias

What does not depend on x is made ready at load, in fp32. The columns that pad K are left out, for
an input is 0 there. The quantizers give what those of `quantizers` give, to the last bit, in as few
passes as plain torch allows: at the sizes of the small Sana a pass costs more by being called than
by what it computes.
"""

# M rows of x   N out channels   K in channels   G groups along K   C channels of a group   R rank

from collections.abc import Callable, Mapping
from typing import Final

import torch
from gesso_kernels.number_formats import E2M1_MAX, E4M3_MAX, INT4_MAX, INT8_MAX, UINT4_MAX
from torch import Tensor

from gesso_core.layers.linear import Activation, linear
from gesso_core.quant.record import ActivationFormat, QuantizedLinear

_HALF: Final = (torch.float16, torch.bfloat16)
# A scale of 0 stands under zeros only; any other keeps them zeros and avoids 0 / 0.
_SMALLEST: Final = torch.finfo(torch.float32).smallest_normal
_SMALLEST_E4M3: Final = 2.0**-9


def _constant(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    # As an operand, a tensor takes half the time of a Python number.
    return torch.tensor(value, dtype=dtype, device="cpu")


_INT4_MAX: Final = _constant(INT4_MAX)
_UINT4_MAX: Final = _constant(UINT4_MAX)
_INT8_MAX: Final = _constant(INT8_MAX)
_E2M1_MAX: Final = _constant(E2M1_MAX)
_EXPONENT_BITS: Final = _constant(0x7F80_0000, torch.int32)
# Times the power of two of a number: what rounds it to one bit of mantissa when added.
_ROUNDS_TO_ONE_BIT: Final = 1.5 * 2.0**22


def exact_buffers(record: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `exact_linear` needs of a layer whose x has the type ``dtype``; all but λ in fp32.

    ``weight`` [N, K + R], ``smooth`` [K], ``down`` [K, R] and ``bias`` [N], K without padding.
    ``smooth`` is λ, or 1/λ for int8 inputs, which are multiplied with it.
    """
    columns = slice(record.in_features)
    residual_NK, smooth_K = record.residual(), record.smooth[columns]
    if record.activation == "16bit":
        residual_NK = residual_NK.to(dtype).float()
    multiplies = record.activation == "int8"
    buffers = {
        "weight": torch.cat([residual_NK[:, columns], record.up.float()], dim=1),
        "smooth": 1 / smooth_K.float() if multiplies else smooth_K.to(dtype).clone(),
        "down": record.down[:, columns].float().mT.contiguous(),
    }
    return buffers if record.bias is None else buffers | {"bias": record.bias.float()}


def exact_linear(
    x: Tensor,
    buffers: Mapping[str, Tensor | None],
    *,
    format: ActivationFormat,  # noqa: A002
    shift: float,
    activation: Activation,
) -> Tensor:
    """``activation(layer(x))`` for x (..., K); (..., N) in the dtype of x. No gradient flows.

    Args:
        buffers: of `exact_buffers`.
        format: what x is quantized to.
        shift: added to x before the quantizer.
        activation: applied before y is rounded to its dtype.
    """
    weight, smooth, down = buffers["weight"], buffers["smooth"], buffers["down"]
    assert weight is not None
    assert smooth is not None
    assert down is not None
    x_MK = x.reshape(-1, x.shape[-1])
    raw_MK = x_MK.float() if format == "int8" else x_MK
    q_MK = QUANTIZERS[format](raw_MK + shift if shift else raw_MK, smooth)
    y_MN = linear(torch.cat((q_MK, _low_rank(x_MK, down)), 1), weight, buffers["bias"], activation)
    return y_MN.to(x.dtype).view(*x.shape[:-1], -1)


def _low_rank(x_MK: Tensor, down_KR: Tensor) -> Tensor:
    if x_MK.dtype not in _HALF:
        return x_MK @ down_KR
    return (x_MK.float() @ down_KR).to(x_MK.dtype).float()


def _int4(x_MK: Tensor, smooth_K: Tensor) -> Tensor:
    return _int4_values(x_MK, smooth_K, _INT4_MAX)


def _uint4(x_MK: Tensor, smooth_K: Tensor) -> Tensor:
    return _int4_values(x_MK, smooth_K, _UINT4_MAX, unsigned=True)


def _int4_values(
    x_MK: Tensor, smooth_K: Tensor, largest: Tensor, *, unsigned: bool = False
) -> Tensor:
    h_MGC = _groups_of_quotients(x_MK, smooth_K, 64)
    s_MG1 = h_MGC.abs().amax(-1, True).div_(largest).clamp_min_(_SMALLEST)
    # No code is beyond the largest, which belongs to the absolute maximum.
    codes_MGC = h_MGC.mul_(s_MG1.reciprocal()).round_()
    if unsigned:
        codes_MGC.clamp_min_(0)
    if x_MK.dtype in _HALF:
        s_MG1 = s_MG1.to(x_MK.dtype).float()
    return _ungrouped(codes_MGC.mul_(s_MG1), x_MK)


def _nvfp4(x_MK: Tensor, smooth_K: Tensor) -> Tensor:
    h_MGC = _groups_of_quotients(x_MK, smooth_K, 16)
    # Magnitudes are in the order of their bits, and for short groups integers are the faster.
    amax_MG1 = h_MGC.abs().view(torch.int32).amax(-1, True).view(torch.float32)
    s_MG1 = amax_MG1.div_(_E2M1_MAX).clamp_max_(E4M3_MAX).to(torch.float8_e4m3fn).float()
    _round_to_e2m1_(h_MGC.div_(s_MG1.clamp_min(_SMALLEST_E4M3)))
    return _ungrouped(h_MGC.mul_(s_MG1), x_MK)


def _round_to_e2m1_(x: Tensor) -> None:
    """Round fp32 numbers to the nearest of e2m1, ties to even, in place.

    A number between 2^e and 2^(e+1) is a multiple of 2^(e−1) afterwards, and ½ is the smallest
    step. Such is the spacing of fp32 around 1.5 · 2^(e+22): adding that rounds, and subtracting it
    is exact.
    """
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    power = torch.bitwise_and(x.view(torch.int32), _EXPONENT_BITS).view(torch.float32)
    power.clamp_min_(1)
    x.add_(power, alpha=_ROUNDS_TO_ONE_BIT).sub_(power, alpha=_ROUNDS_TO_ONE_BIT)


def _int8(x_MK: Tensor, reciprocal_K: Tensor) -> Tensor:
    h_MK = x_MK * reciprocal_K
    s_M1 = h_MK.abs().amax(1, True).div_(_INT8_MAX).clamp_min_(_SMALLEST)
    return h_MK.div_(s_M1).round_().mul_(s_M1)


def _16bit(x_MK: Tensor, smooth_K: Tensor) -> Tensor:
    return (x_MK / smooth_K).float()


def _groups_of_quotients(x_MK: Tensor, smooth_K: Tensor, size: int) -> Tensor:
    """x / λ in the dtype of x, then fp32 [M, G, C]; whole groups, filled with 0."""
    rows, columns = x_MK.shape
    missing = -columns % size
    if missing:
        h_MK = x_MK.new_zeros(rows, columns + missing)
        torch.div(x_MK, smooth_K, out=h_MK.narrow(1, 0, columns))
    else:
        h_MK = x_MK / smooth_K
    return h_MK.float().view(rows, (columns + missing) // size, size)


def _ungrouped(values_MGC: Tensor, like_MK: Tensor) -> Tensor:
    rows, columns = like_MK.shape
    padded = values_MGC.shape[1] * values_MGC.shape[2]
    values_MK = values_MGC.view(rows, padded)
    return values_MK if padded == columns else values_MK.narrow(1, 0, columns)


QUANTIZERS: Final[dict[ActivationFormat, Callable[[Tensor, Tensor], Tensor]]] = {
    "int4": _int4,
    "uint4": _uint4,
    "nvfp4": _nvfp4,
    "int8": _int8,
    "16bit": _16bit,
}
