"""Matrix products of tokens with weights, at the speed of the machine.

On a CPU PyTorch sends fp32 products to MKL, whose kernels stay at half vector width on AMD
processors; oneDNN, which PyTorch carries as well, uses the full width everywhere. For the shapes of
Sana that is a factor of two, forward and backward. Other devices and dtypes take the ordinary path,
and so do tracing and autocast.

The choice depends on the weight alone, never on the number of rows, so that a sample's numbers do
not change with the batch it is computed in.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gesso_core.layers.adapters import active_low_rank, low_rank_product

Activation = Literal["none", "silu"]

# Below this many weights the fixed cost of a oneDNN call outweighs its speed.
_SMALL_WEIGHT = 16_384
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ONEDNN_NAMES = {"none": "none", "silu": "swish"}


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    """``activation(x @ weight.T + bias)``, differentiable.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        activation: applied in the same pass where the device offers that.
    """
    if not _onednn_is_better(x, weight):
        y = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and _needs_grad(x, weight, bias):
        y = cast(Tensor, _OneDNNLinear.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    else:
        return _onednn(x, weight, bias, activation)
    return F.silu(y) if activation == "silu" else y


class Linear(nn.Linear):
    """``nn.Linear`` through `linear`; parameters and initialisation are those of ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        return _with_low_rank(self, x, self.weight, self.bias)


def replace_linear_layers(module: nn.Module) -> None:
    """Let `Linear` stand for every plain ``nn.Linear`` inside ``module``, with its parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _with_parameters_of(child))


class PointwiseConv(nn.Module):
    """A 1x1 convolution on tokens (..., I) → (..., O), with a convolution's parameter shapes."""

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The library default of convolutions: uniform within 1/√I."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """Apply the convolution to channels-last tokens."""
        return _with_low_rank(self, x, self.weight.flatten(1), self.bias, activation)


def _with_parameters_of(layer: nn.Linear) -> Linear:
    with torch.device("meta"):
        ours = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    ours.weight, ours.bias = layer.weight, layer.bias
    return ours.train(layer.training)


def _with_low_rank(
    module: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation = "none",
) -> Tensor:
    """`linear`, plus the product of the low-rank factors that are active for ``module``."""
    low_rank = active_low_rank(module)
    if low_rank is None:
        return linear(x, weight, bias, activation)
    y = linear(x, weight, bias) + low_rank_product(x, low_rank)
    return F.silu(y) if activation == "silu" else y


def _onednn_is_better(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= _SMALL_WEIGHT
        and x.numel() > 0
        and _HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, _ONEDNN_NAMES[activation], [], ""
    )
    return y


class _OneDNNLinear(torch.autograd.Function):
    """The two products of the backward pass go the same way as the forward one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_rows = grad_y.flatten(0, -2)
        grad_x = _onednn(grad_y, weight.t()) if needs_x else None
        grad_weight = _onednn(grad_rows.t(), x.flatten(0, -2).t()) if needs_weight else None
        return grad_x, grad_weight, grad_rows.sum(0) if needs_bias else None
