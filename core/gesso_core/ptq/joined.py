"""Linears that read the same input (q, k and v), quantized as one: they share λ and ``down``."""

# N out channels of one layer   K in channels

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gesso_core.quant.record import QuantizedLinear

Matrix = tuple[Tensor, Tensor | None]


def join(matrices: Sequence[Matrix]) -> Matrix:
    """The rows of all of them; where only some have a bias, the others get one of zeros."""
    weight = torch.cat([weight_NK for weight_NK, _ in matrices])
    if all(bias_N is None for _, bias_N in matrices):
        return weight, None
    biases = [w.new_zeros(len(w)) if bias_N is None else bias_N for w, bias_N in matrices]
    return weight, torch.cat(biases)


def split_rows(record: QuantizedLinear, matrices: Sequence[Matrix]) -> list[QuantizedLinear]:
    """The records of the layers that were joined."""
    parts, start = [], 0
    for weight_NK, bias_N in matrices:
        rows = slice(start, start + len(weight_NK))
        start = rows.stop
        scale, bias = record.tensor_scale, record.bias
        needs_bias = bias_N is not None or record.shift != 0
        part = replace(
            record,
            codes=record.codes[rows].clone(),
            scale=record.scale[rows].clone(),
            up=record.up[rows].clone(),
            # One of several values is the same for all rows of a layer.
            tensor_scale=None if scale is None else scale[rows.start : rows.start + 1].clone(),
            bias=None if bias is None or not needs_bias else bias[rows].clone(),
            smooth=record.smooth.clone(),
            down=record.down.clone(),
        )
        parts.append(part)
    return parts
