"""The comparison that every quantizer has to beat: weights and inputs rounded, and nothing else."""

import torch
from torch import Tensor, nn

from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.layer_map import find_layers, layer_map, matrix_of
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.quant.record import ActivationFormat, QuantizedLinear, WeightFormat

# Plain rounding looks at no input, but a quantizer wants to be shown some.
UNUSED_ROWS = 64


def naive_layer(
    weight_NK: Tensor, bias_N: Tensor | None, *, weight: WeightFormat, activation: ActivationFormat
) -> QuantizedLinear:
    """A layer without smoothing, low-rank branch and GPTQ; scales in float16."""
    options = QuantOptions(
        weight=weight, activation=activation, rank=0, smooth=False, dtype=torch.float16
    )
    x_MK = torch.ones(UNUSED_ROWS, weight_NK.shape[1])
    return quantize_linear(weight_NK, bias_N, x_MK, options)[0]


def round_plainly(
    model: nn.Module, *, weight: WeightFormat, activation: ActivationFormat, rules: str = "sana"
) -> None:
    """Replace the layers of a layer map by naive ones; those with 16-bit inputs keep them so."""
    for name, rule in find_layers(model, layer_map(rules)).items():
        parent, _, child = name.rpartition(".")
        matrix_NK, bias_N = matrix_of(model.get_submodule(name), name)
        inputs: ActivationFormat = "16bit" if rule.activation == "16bit" else activation
        record = naive_layer(matrix_NK, bias_N, weight=weight, activation=inputs)
        layer = SVDQuantLinear.from_record(record, "reference", name=name)
        setattr(model.get_submodule(parent), child, layer)
