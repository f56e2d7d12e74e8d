"""Where the error of a quantized layer counts: behind the layer, or behind the module around it.

Queries, keys and values are only as wrong as the attention that they lead to. For such layers whole
sequences are kept, with everything else that the surrounding module was called with, and a trial
output of the layer is put through that module.
"""

# B sequences   N tokens, or channels of an output   D channels   L text tokens   M some rows

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from gesso_core.errors import ConfigError
from gesso_core.layers.attention import CrossAttention
from gesso_core.layers.modulation import Modulation
from gesso_core.models.sana_text import MASKED
from gesso_core.quant.layer import Evaluate

# Text of other prompts is longer: what is padded must not be seen.
FILL: Final = {"bias": MASKED}


def parent_inputs(parent: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """What a call of ``parent`` was given, as tensors with one row per sequence.

    Raises:
        ConfigError: a module with inputs that are not known here.
    """
    if isinstance(parent, CrossAttention):
        x_BND, (keys, values), bias_B11L = arguments
        batch, length = keys.shape[:2]
        if bias_B11L is None:
            bias_B11L = keys.new_zeros(batch, 1, 1, length)
        return {"x": x_BND, "keys": keys, "values": values, "bias": bias_B11L}
    x = arguments[0]
    if len(arguments) == 2 and isinstance(arguments[1], Modulation):
        return {"x": arguments[1](x)}  # the parent is then called without a modulation
    if len(arguments) == 1 and isinstance(x, Tensor):
        return {"x": x}
    raise ConfigError(
        f"the error behind a {type(parent).__name__} cannot be measured, since it takes more than "
        "one tensor; measure behind the layer in its layer map"
    )


def behind_parent(
    parent: nn.Module, children: Mapping[str, int], inputs: Mapping[str, Tensor]
) -> Evaluate:
    """From outputs of layers to what ``parent``, which they belong to, makes of them.

    Args:
        parent: the module around.
        children: names of the layers, and the number of their output channels; their outputs come
            side by side.
        inputs: as `parent_inputs` gave them.

    Returns:
        A function of outputs (m, N) of whole sequences, and the numbers of their rows among all.
    """
    tokens = inputs["x"].shape[1]

    def evaluate(y_MN: Tensor, rows_M: Tensor) -> Tensor:
        sequences = rows_M[::tokens] // tokens
        some = {name: tensor[sequences] for name, tensor in inputs.items()}
        x_BND = some["x"]
        arguments: tuple[Any, ...] = (x_BND,)
        if "keys" in some:
            arguments = (x_BND, (some["keys"], some["values"]), some["bias"])
        joined = y_MN.view(*x_BND.shape[:-1], -1).to(x_BND.dtype)
        given = torch.split(joined, list(children.values()), dim=-1)
        layers = {name: getattr(parent, name) for name in children}
        try:
            for name, y_BNN in zip(children, given, strict=True):
                setattr(parent, name, _Given(y_BNN))
            output: Tensor = parent(*arguments)
        finally:
            for name, layer in layers.items():
                setattr(parent, name, layer)
        return output.flatten(0, -2).float()

    return evaluate


class _Given(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output
