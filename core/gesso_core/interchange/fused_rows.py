"""Quantized layers that read one input, stacked along their output channels.

Other tools quantize q, k and v one by one; our modules have them as one layer. Residuals stack as
they are, tensor scales become one per row, and branches of different A become block-diagonal.
"""

# N output channels   K input channels   R rank

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.lora import Factors, block_diagonal
from gesso_core.models.keys.sana import sana_keys
from gesso_core.models.keys.translate import translate
from gesso_core.quant.record import QuantizedLinear


def fuse_rows(name: str, layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One record for several; raises `WeightsError` if they scale their input differently."""
    first = layers[0]
    if len(layers) == 1:
        return first
    alike = [
        (x.weight, x.activation, x.in_features, x.shift, x.bias is None, x.tensor_scale is None)
        for x in layers
    ]
    if len(set(alike)) > 1 or not all(torch.equal(x.smooth, first.smooth) for x in layers):
        raise WeightsError(
            f"the parts of {name} scale the same input differently, or have other formats; export "
            "the checkpoint with q, k and v calibrated together"
        )
    down_RK, up_NR = block_diagonal([Factors(x.down, x.up) for x in layers])
    return replace(
        first,
        codes=torch.cat([x.codes for x in layers]),
        scale=torch.cat([x.scale for x in layers]),
        tensor_scale=_row_scales(layers),
        down=down_RK,
        up=up_NR,
        bias=_stacked([x.bias for x in layers]),
    )


def sana_names(layers: Mapping[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """Layers of a SANA under diffusers names, under ours and fused.

    Raises:
        WeightsError: a layer that SANA does not have, or a part without the others.
    """
    names = list(layers)
    # The key table stacks parts in its order, so numbers in place of weights tell who goes where.
    numbers = {f"{name}.weight": torch.tensor([i]) for i, name in enumerate(names)}
    moved = translate(numbers, sana_keys(numbers))
    parts = {
        ours.removesuffix(".weight"): [layers[names[i]] for i in order.tolist()]
        for ours, order in moved.items()
    }
    return {ours: fuse_rows(ours, group) for ours, group in parts.items()}


def _row_scales(layers: Sequence[QuantizedLinear]) -> Tensor | None:
    found = [x.tensor_scale for x in layers]
    rows = [
        None if s is None else s.expand(x.out_features) for s, x in zip(found, layers, strict=True)
    ]
    return _stacked(rows)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
