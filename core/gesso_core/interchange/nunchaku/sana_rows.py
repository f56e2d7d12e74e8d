"""Row orders of SANA layers in the nunchaku engine: qkv per head, value and gate adjacent.

An order is an index per row of the target, −1 for padding.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.packing import TILE
from gesso_core.quant.record import QuantizedLinear


def engine_rows(layer: str, rows: int, head_dim: int) -> Tensor | None:
    """For every row of the engine our row, −1 for padding; None if the order is the same."""
    if layer == "ffn.expand":
        return pairs(rows // 2)
    if layer != "attention.qkv":
        return None
    width = rows // 3
    padded = _tiles(width)
    ours = torch.full((3, padded), -1)
    ours[:, :width] = torch.arange(rows).view(3, width)
    if padded % head_dim or width % head_dim:
        raise WeightsError(f"heads of {head_dim} channels do not fill a width of {width}")
    keys_values = ours[1:].reshape(2, -1, head_dim).transpose(0, 1)
    return torch.cat([ours[0], keys_values.flatten()])


def pairs(hidden: int) -> Tensor:
    """Adjacent (value, gate) of our [values | gates], padded to whole tiles."""
    ours = torch.full((2, _tiles(hidden)), -1)
    ours[:, :hidden] = torch.arange(2 * hidden).view(2, hidden)
    return ours.T.flatten()


def _tiles(width: int) -> int:
    return -(-width // TILE) * TILE


def inverse(order: Tensor, rows: int) -> Tensor:
    """For each of our rows the row of the engine."""
    found = torch.full((rows,), -1)
    there = order >= 0
    found[order[there]] = torch.arange(len(order))[there]
    return found


def take(x: Tensor, rows: Tensor, fill: float) -> Tensor:
    """Rows of ``x``; ``fill`` where the index is −1."""
    raw = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    filling = torch.full((), fill).to(x.dtype).view(raw.dtype)
    there = (rows >= 0).view(-1, *[1] * (x.ndim - 1))
    return torch.where(there, raw[rows.clamp(min=0)], filling).view(x.dtype)


def take_rows(layer: QuantizedLinear, rows: Tensor) -> QuantizedLinear:
    """The layer with its output channels in another order; neutral rows where the index is −1."""
    tensor_scale = layer.tensor_scale
    if tensor_scale is not None and tensor_scale.numel() > 1:
        tensor_scale = take(tensor_scale, rows, 1)
    return replace(
        layer,
        codes=take(layer.codes, rows, 0),
        scale=take(layer.scale, rows, 1),
        up=take(layer.up, rows, 0),
        bias=None if layer.bias is None else take(layer.bias, rows, 0),
        tensor_scale=tensor_scale,
    )
