"""What a quantized layer computes, in plain torch: the oracle of the kernels and of `exact`.

    h = T(T(x + δ) / λ)                      4-bit inputs: both steps rounded to T, the type of x
    h = (x + δ) · (1 / λ)                    8-bit inputs: fp32
    y = T( Q(h) · Rᵀ + T(x · downᵀ) · upᵀ + bias )

All sums are fp32. An fp32 x is rounded nowhere. A layer with 16-bit activations multiplies T(x / λ)
with the weight dequantized to T.
"""

# M tokens   K in channels, padded   R rank

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_core.quant.quantizers import InputFormat, quantize_input
from gesso_core.quant.record import QuantizedLinear

_HALF = (torch.float16, torch.bfloat16)


def smoothed_input(
    x_MK: Tensor, smooth_K: Tensor, *, shift: float, activation: InputFormat
) -> Tensor:
    """h [M, K], padded to the length of λ with 0: in the dtype of x for 4-bit inputs, else fp32."""
    columns = x_MK.shape[1]
    if activation in ("int8", "fp8"):
        h_MK = (x_MK.float() + shift) * (1 / smooth_K[:columns].float())
    else:
        h_MK = (x_MK + shift if shift else x_MK) / smooth_K[:columns].to(x_MK.dtype)
    return F.pad(h_MK, (0, smooth_K.shape[0] - columns))


def svdquant_linear_ref(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The output of a layer for x (..., in_features); (..., N) in the dtype of x.

    Raises:
        ValueError: x has another number of channels.
    """
    if x.shape[-1] != layer.in_features:
        raise ValueError(
            f"the input has {x.shape[-1]} channels, this layer reads {layer.in_features}; "
            "pass it without padding"
        )
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _weight_only(layer, x_MK) if layer.activation == "16bit" else _quantized(layer, x_MK)
    y_MN += low_rank_output(x_MK, layer.down[:, : layer.in_features], layer.up)
    if layer.bias is not None:
        y_MN += layer.bias.float()
    return y_MN.to(x.dtype).view(*x.shape[:-1], -1)


def _quantized(layer: QuantizedLinear, x_MK: Tensor) -> Tensor:
    h_MK = smoothed_input(x_MK, layer.smooth, shift=layer.shift, activation=layer.activation)
    h = quantize_input(h_MK, layer.activation)
    if layer.weight == "int8" and layer.activation == "int8":
        # Integers first, both scales after: exact up to the size of fp32's integers.
        return (h.levels @ layer.codes.float().mT) * h.scale * layer.scale.mT
    return h.dequantized() @ layer.residual().mT


def _weight_only(layer: QuantizedLinear, x_MK: Tensor) -> Tensor:
    h_MK = smoothed_input(x_MK, layer.smooth, shift=layer.shift, activation="16bit")
    return h_MK.float() @ layer.residual().to(x_MK.dtype).float().mT


def low_rank_output(x_MK: Tensor, down_RK: Tensor, up_NR: Tensor) -> Tensor:
    """The branch on the raw x, fp32 [M, N]; its inner vector is rounded to T like the kernels'."""
    low_rank_MR = x_MK.float() @ down_RK.float().mT
    if x_MK.dtype in _HALF:
        low_rank_MR = low_rank_MR.to(x_MK.dtype).float()
    return low_rank_MR @ up_NR.float().mT
