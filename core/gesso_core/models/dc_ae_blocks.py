"""Building blocks of DC-AE (arXiv 2410.10733): residual, EfficientViT and resampling blocks.

Every resampling block adds its convolution to a parameter-free, lossless rearrangement of its
input (space to channel, channel to space), so the network learns residuals only.
"""

# B batch   C channels   H height   W width   N pixels (H·W)   D head dimension

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from gesso_kernels.gated_silu import gated_silu
from gesso_kernels.relu_linear_attention import relu_linear_attention
from gesso_kernels.rms_norm import rms_norm_2d
from torch import Tensor, nn

from gesso_core.errors import ConfigError
from gesso_core.models.dc_ae_config import Activation, Downsampling, Norm, Stage, Upsampling

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def channel_average(x_BCHW: Tensor, channels: int, factor: int) -> Tensor:
    """The down shortcut: space to channel, then the mean over groups of consecutive channels."""
    if factor > 1:
        x_BCHW = F.pixel_unshuffle(x_BCHW, factor)
    batch, _, height, width = x_BCHW.shape
    return x_BCHW.reshape(batch, channels, -1, height, width).mean(dim=2)


def channel_duplicate(x_BCHW: Tensor, channels: int, factor: int) -> Tensor:
    """The up shortcut: each channel repeated consecutively, then channel to space."""
    repeats = channels * factor**2 // x_BCHW.shape[1]
    y = x_BCHW.repeat_interleave(repeats, dim=1)
    return F.pixel_shuffle(y, factor) if factor > 1 else y


class RMSNorm2d(nn.Module):
    """RMS norm over the channels of every pixel, with weight and bias; statistics in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and dtype."""
        return rms_norm_2d(x_BCHW, self.weight, self.bias, self.eps)


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A norm over channels, by its name in the configuration."""
    return RMSNorm2d(channels) if kind == "rms_norm" else nn.BatchNorm2d(channels)


def conv3(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """3×3 convolution with padding 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x))))."""

    def __init__(self, width: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.conv1 = conv3(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.conv2 = conv3(width, width, bias=False)
        self.norm = make_norm(norm, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        y: Tensor = self.norm(self.conv2(self.activation(self.conv1(x_BCHW))))
        return x_BCHW + y


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: 1×1, SiLU, 3×3 depthwise, gate, 1×1, norm; no residual."""

    def __init__(self, width: int, expand: float = 4.0) -> None:
        super().__init__()
        middle = round(expand * width)
        self.expand = nn.Conv2d(width, 2 * middle, 1)
        self.depthwise = nn.Conv2d(2 * middle, 2 * middle, 3, padding=1, groups=2 * middle)
        self.project = nn.Conv2d(middle, width, 1, bias=False)
        self.norm = RMSNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        hidden = self.depthwise(F.silu(self.expand(x_BCHW)))
        y: Tensor = self.norm(self.project(gated_silu(hidden)))
        return y


class ScaleAggregation(nn.Module):
    """A further scale of q, k and v: depthwise k×k, then mixing inside each head's q, k or v."""

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.mix = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, qkv_BCHW: Tensor) -> Tensor:
        """[B, 3·heads·D, H, W] to the same shape."""
        y: Tensor = self.mix(self.depthwise(qkv_BCHW))
        return y


class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention. No residual.

    ``qkv`` is head-major: the channels of one head are [q | k | v], heads follow each other.
    """

    def __init__(
        self, width: int, head_dim: int, scales: Sequence[int] = (), norm: Norm = "rms_norm"
    ) -> None:
        super().__init__()
        heads = width // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.scales = nn.ModuleList(ScaleAggregation(3 * inner, k, 3 * heads) for k in scales)
        self.project = nn.Conv2d(inner * (1 + len(scales)), width, 1, bias=False)
        self.norm = make_norm(norm, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        qkv = self.qkv(x_BCHW)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)
        y: Tensor = self.norm(self.project(multi_head_relu_attention(qkv, self.head_dim)))
        return y


def multi_head_relu_attention(
    qkv_BCHW: Tensor,
    head_dim: int,
    eps: float = 1e-15,
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor] = relu_linear_attention,
) -> Tensor:
    """Head-major [B, heads·3·D, H, W] to [B, heads·D, H, W]; the core is in fp32."""
    batch, _, height, width = qkv_BCHW.shape
    qkv_BhCN = qkv_BCHW.reshape(batch, -1, 3 * head_dim, height * width)
    q, k, v = qkv_BhCN.chunk(3, dim=2)
    out_BhDN = attention(q, k, v, eps)
    return out_BhDN.reshape(batch, -1, height, width)


class EfficientViTBlock(nn.Module):
    """x + attention(x), then x + gated bottleneck(x)."""

    def __init__(self, width: int, head_dim: int, scales: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.attention = LiteMLA(width, head_dim, scales, norm)
        self.feed_forward = GLUMBConv(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        x_BCHW = x_BCHW + self.attention(x_BCHW)
        y: Tensor = x_BCHW + self.feed_forward(x_BCHW)
        return y


class Downsample(nn.Module):
    """Halves height and width: a convolution, plus the averaging shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, kind: Downsampling, *, shortcut: bool
    ) -> None:
        super().__init__()
        self.unshuffle = kind == "pixel_unshuffle"
        require_divisible("pixel unshuffle", out_channels, 4 if self.unshuffle else 1)
        if shortcut:
            require_divisible("the down shortcut", in_channels * 4, out_channels)
        self.out_channels = out_channels
        self.shortcut = shortcut
        self.conv = (
            conv3(in_channels, out_channels // 4)
            if self.unshuffle
            else conv3(in_channels, out_channels, stride=2)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H/2, W/2]."""
        y: Tensor = self.conv(x_BCHW)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        return y + channel_average(x_BCHW, self.out_channels, 2) if self.shortcut else y


class Upsample(nn.Module):
    """Doubles height and width: a convolution, plus the duplicating shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, kind: Upsampling, *, shortcut: bool
    ) -> None:
        super().__init__()
        self.shuffle = kind == "pixel_shuffle"
        if shortcut:
            require_divisible("the up shortcut", out_channels * 4, in_channels)
        self.out_channels = out_channels
        self.shortcut = shortcut
        self.conv = conv3(in_channels, out_channels * (4 if self.shuffle else 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, 2H, 2W]."""
        if self.shuffle:
            y = F.pixel_shuffle(self.conv(x_BCHW), 2)
        else:
            y = self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))
        return y + channel_duplicate(x_BCHW, self.out_channels, 2) if self.shortcut else y


def require_divisible(what: str, number: int, divisor: int) -> None:
    """Raise ConfigError unless ``number`` channels are a multiple of ``divisor``."""
    if number % divisor:
        raise ConfigError(f"{what} needs {number} channels to be a multiple of {divisor}")


def make_blocks(stage: Stage, head_dim: int) -> list[nn.Module]:
    """The blocks of a stage, without its resampling."""
    if stage.block == "ResBlock":
        return [ResBlock(stage.width, stage.norm, stage.activation) for _ in range(stage.depth)]
    return [
        EfficientViTBlock(stage.width, head_dim, stage.scales, stage.norm)
        for _ in range(stage.depth)
    ]
