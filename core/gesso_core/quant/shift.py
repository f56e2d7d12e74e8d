"""Linears rewritten before they are quantized: shifted inputs, and inputs in parts.

GELU never goes below −0.1700. With δ = 0.171875 added, its output is non-negative and the unsigned
4-bit grid has twice the resolution. The constant is repaired in the bias, in two steps:

    bias′ = bias − δ · rowsum(W)                 the branch reads (x + δ) / λ, as in calibration
    bias″ = bias′ + δ · up · rowsum(down)        the branch reads x, as in `QuantizedLinear`

where down has 1/λ folded in. Both graphs are the same function.
"""

# N out channels   K in channels   R rank

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gesso_core.quant.quantizers import row_parts

GELU_SHIFT: Final = 0.171875


def shifted_bias(weight_NK: Tensor, bias_N: Tensor | None, shift: float) -> Tensor:
    """bias′, summed in float64, in the dtype of the weight; W is the one before smoothing."""
    rows_N = weight_NK.double().sum(1) * shift
    bias = torch.zeros_like(rows_N) if bias_N is None else bias_N.double()
    return (bias - rows_N).to(weight_NK.dtype)


def branch_bias(bias_N: Tensor, up_NR: Tensor, down_RK: Tensor, shift: float) -> Tensor:
    """bias″ from bias′, summed in float64, in the dtype of the bias."""
    share = up_NR.double() @ down_RK.double().sum(1)
    return (bias_N.double() + shift * share).to(bias_N.dtype)


def split_columns(
    weight_NK: Tensor, bias_N: Tensor | None, widths: Sequence[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """One linear as several that each read a part of the input and whose outputs are added.

    The bias goes to the last part, as in the authors' files.

    Raises:
        ValueError: the widths do not add up to K.
    """
    if sum(widths) != weight_NK.shape[1]:
        raise ValueError(
            f"parts of {list(widths)} columns do not add up to the {weight_NK.shape[1]} of the "
            "weight; give widths whose sum is the number of its columns"
        )
    weights = [part.mT for part in row_parts(weight_NK.mT, widths)]
    biases = [*[None] * (len(weights) - 1), bias_N]
    return list(zip(weights, biases, strict=True))
