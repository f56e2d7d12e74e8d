"""Adaptive layer norm in front of a layer, which quantized layers compute while they quantize."""

from typing import NamedTuple, Protocol, cast

from gesso_kernels.modulated_norm import modulated_norm
from torch import Tensor, nn

from gesso_core.layers.linear import Activation


class _ReadsUnnormed(Protocol):
    def normed(
        self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, activation: Activation
    ) -> Tensor: ...


class Modulation(NamedTuple):
    """LayerNorm without an affine map, times ``1 + scale``, plus ``shift``; both (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    eps: float

    def __call__(self, x_BND: Tensor) -> Tensor:
        """The modulated norm of tokens."""
        return modulated_norm(x_BND, *self)


def modulated(
    layer: nn.Module,
    x_BND: Tensor,
    modulation: Modulation | None,
    activation: Activation = "none",
) -> Tensor:
    """``layer(modulation(x), activation)``, without the norm where there is no modulation.

    A layer with a method ``normed`` computes both in one pass over x.
    """
    if modulation is not None and hasattr(layer, "normed"):
        return cast(_ReadsUnnormed, layer).normed(x_BND, *modulation, activation)
    inputs = x_BND if modulation is None else modulation(x_BND)
    y: Tensor = layer(inputs) if activation == "none" else layer(inputs, activation)
    return y
