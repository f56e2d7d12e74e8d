"""Convolutions for inference on a CPU: oneDNN with weights in its own order, or Winograd.

The oneDNN operators are the ones that torch's own compiler emits.
"""

# B batch   C input channels   O output channels   H height   W width

from typing import Literal

import torch
import torch.nn.functional as F
from gesso_kernels.winograd_conv import tile_size, winograd_conv2d
from torch import Tensor, nn

ActivationName = Literal["none", "relu", "silu"]

_ONEDNN = {"none": "none", "relu": "relu", "silu": "swish"}
# Winograd pays from here on (measured): channels that make its matrix products efficient, weights
# that are small next to the image.
_WINOGRAD_MIN_CHANNELS = 256
_WINOGRAD_MAX_WEIGHTS = 512 * 1024
_WINOGRAD_MIN_PIXELS = 32 * 32


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether the CPU at hand computes fast in this number format."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def fast_conv(conv: nn.Conv2d, activation: ActivationName = "none") -> nn.Module:
    """The convolution followed by the activation, in whichever form suits its shape."""
    if conv.kernel_size == (1, 1) and conv.groups == 1:
        return PackedProjection(conv, activation)
    if _suits_winograd(conv):
        return WinogradConv(conv, activation)
    return PackedConv(conv, activation)


def _suits_winograd(conv: nn.Conv2d) -> bool:
    narrow, wide = sorted((conv.in_channels, conv.out_channels))
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and narrow >= _WINOGRAD_MIN_CHANNELS
        and narrow * wide <= _WINOGRAD_MAX_WEIGHTS
    )


class PackedConv(nn.Module):
    """A convolution with its weights in the order oneDNN computes with, and a fused activation."""

    def __init__(self, conv: nn.Conv2d, activation: ActivationName = "none") -> None:
        super().__init__()
        self.bias = conv.bias
        self.geometry = (
            list(_ints(conv.padding)),
            list(conv.stride),
            list(conv.dilation),
            conv.groups,
        )
        self.activation = _ONEDNN[activation]
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), *self.geometry
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, O, H', W']."""
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # and so will be the result
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x_BCHW, self.packed, self.bias, *self.geometry, self.activation, [], ""
        )
        return y


class PackedProjection(nn.Module):
    """A 1×1 convolution as a matrix product with packed weights, pixels as rows."""

    def __init__(self, conv: nn.Conv2d, activation: ActivationName = "none") -> None:
        super().__init__()
        self.bias = conv.bias
        self.activation = _ONEDNN[activation]
        weight_OC = conv.weight.detach().flatten(1).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OC)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, O, H, W]."""
        batch, channels, height, width = x_BCHW.shape
        x_PC = x_BCHW.permute(0, 2, 3, 1).reshape(-1, channels)
        y_PO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_PC, self.packed, self.bias, self.activation, [], ""
        )
        return y_PO.view(batch, height, width, -1).permute(0, 3, 1, 2)


class WinogradConv(nn.Module):
    """A 3×3 convolution with padding 1; Winograd for large images, direct for the rest."""

    def __init__(self, conv: nn.Conv2d, activation: ActivationName = "none") -> None:
        super().__init__()
        taps_33OC = conv.weight.detach().permute(2, 3, 0, 1).contiguous()
        self.taps_9OC = nn.Parameter(taps_33OC.flatten(0, 1), requires_grad=False)
        self.bias = conv.bias
        self.activation = activation

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, O, H, W]."""
        height, width = x_BCHW.shape[-2:]
        m = tile_size(x_BCHW.dtype)
        if height % m or width % m or height * width < _WINOGRAD_MIN_PIXELS:
            return self._direct(x_BCHW)
        return winograd_conv2d(x_BCHW, self.taps_9OC, self.bias, self.activation)

    def _direct(self, x_BCHW: Tensor) -> Tensor:
        weight_OC33 = self.taps_9OC.view(3, 3, *self.taps_9OC.shape[1:]).permute(2, 3, 0, 1)
        y = F.conv2d(x_BCHW, weight_OC33, self.bias, padding=1)
        if self.activation == "none":
            return y
        return y.relu_() if self.activation == "relu" else F.silu(y, inplace=True)


def _ints(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)
    return padding
