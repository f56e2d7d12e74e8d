"""The same DC-AE, faster: an inference form of every block for CPUs.

`fuse_for_inference` replaces the blocks of a model in place. What it does, all of it equal to the
plain blocks up to rounding:

* ``channels_last`` from end to end, so a norm over channels reads memory in order;
* batch norm folded into the convolution before it;
* convolutions with weights kept in the order oneDNN computes with, activations applied on the fly;
* wide 3×3 convolutions of large images by Winograd's algorithm (`gesso_kernels.winograd_conv`);
* upsample-then-convolve at the low resolution (`gesso_kernels.upsample_conv`);
* norms, gates, residuals and resampling shortcuts in place, without intermediate images.

On other devices, and for number formats oneDNN has no kernels for, only the first two apply.
"""

# B batch   C channels   H height   W width   N pixels (H·W)   D head dimension   G heads

from collections.abc import Callable
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from gesso_kernels.relu_linear_attention import relu_linear_attention_tokens
from gesso_kernels.rms_norm import rms_norm_2d_
from gesso_kernels.upsample_conv import fold_phases
from torch import Tensor, nn

from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_blocks import (
    Downsample,
    EfficientViTBlock,
    GLUMBConv,
    LiteMLA,
    ResBlock,
    RMSNorm2d,
    ScaleAggregation,
    Upsample,
    channel_average,
    channel_duplicate,
)
from gesso_core.models.dc_ae_fused_conv import fast_conv, has_kernels

_PHASES = tuple(product((0, 1), (0, 1)))  # (row, column) of a pixel in its 2×2 block


def fuse_for_inference(model: DCAE) -> DCAE:
    """Turn a DC-AE into its inference form, in place, and return it.

    The result encodes and decodes as before, without gradients. Its state dict is no longer that of
    a DC-AE, and it cannot be moved to another device or number format: fuse last.
    """
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    weight = model.encoder.project_out.weight
    if weight.device.type == "cpu" and has_kernels(weight.dtype):
        _replace_blocks(model)
        return model
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def fold_batch_norms(model: nn.Module) -> None:
    """Replace every batch norm by scaled weights and a bias of the convolution before it."""
    for block in model.modules():
        if isinstance(block, ResBlock) and isinstance(block.norm, nn.BatchNorm2d):
            block.conv2, block.norm = _folded(block.conv2, block.norm), nn.Identity()
        if isinstance(block, LiteMLA) and isinstance(block.norm, nn.BatchNorm2d):
            block.project, block.norm = _folded(block.project, block.norm), nn.Identity()


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """conv, then norm in eval mode, as one convolution with a bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    dtype = conv.weight.dtype
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    return conv


def _replace_blocks(module: nn.Module) -> None:
    # Names first: the iterator would keep every replaced block, and its weights, alive.
    for name in [name for name, _ in module.named_children()]:
        child = module.get_submodule(name)
        fused = _fused(child)
        if fused is None:
            _replace_blocks(child)
        else:
            setattr(module, name, fused)


def _fused(module: nn.Module) -> nn.Module | None:
    """The inference form of a block; None for a container."""
    for kind, build in _INFERENCE_FORMS.items():
        if isinstance(module, kind):
            return build(module)
    return None


class FusedRMSNorm2d(nn.Module):
    """RMS norm that overwrites its input, or adds a residual to the norm."""

    def __init__(self, norm: RMSNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to the same tensor."""
        return rms_norm_2d_(x_BCHW, self.weight, self.bias, self.eps, residual_BCHW)


class AddInPlace(nn.Module):
    """What is left of a norm that was folded away: only the residual."""

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor) -> Tensor:
        """x + residual, in the memory of x."""
        return x_BCHW.add_(residual_BCHW)


def _fused_norm(norm: nn.Module) -> nn.Module:
    return FusedRMSNorm2d(norm) if isinstance(norm, RMSNorm2d) else AddInPlace()


class FusedResBlock(nn.Module):
    """`ResBlock` with the activation in the first convolution, norm and residual in one pass."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.conv1 = fast_conv(block.conv1, "relu" if _is_relu(block.activation) else "silu")
        self.conv2 = fast_conv(block.conv2)
        self.norm = _fused_norm(block.norm)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        y: Tensor = self.norm(self.conv2(self.conv1(x_BCHW)), x_BCHW)
        return y


def _is_relu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.ReLU)


class FusedGLUMBConv(nn.Module):
    """x + `GLUMBConv`, with the gate applied in place."""

    def __init__(self, block: GLUMBConv) -> None:
        super().__init__()
        self.expand = fast_conv(block.expand, "silu")
        self.depthwise = fast_conv(block.depthwise)
        self.project = fast_conv(block.project)
        self.norm = FusedRMSNorm2d(block.norm)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        value, gate = self.depthwise(self.expand(x_BCHW)).chunk(2, dim=1)
        y: Tensor = self.norm(self.project(value * F.silu(gate, inplace=True)), x_BCHW)
        return y


class FusedLiteMLA(nn.Module):
    """x + `LiteMLA`, pixels as rows: heads are strided views of the convolution's output."""

    def __init__(self, block: LiteMLA) -> None:
        super().__init__()
        self.head_dim = block.head_dim
        self.qkv = fast_conv(block.qkv)
        scales = [cast(ScaleAggregation, scale) for scale in block.scales]
        self.scales = nn.ModuleList(
            nn.Sequential(fast_conv(scale.depthwise), fast_conv(scale.mix)) for scale in scales
        )
        self.project = fast_conv(block.project)
        self.norm = _fused_norm(block.norm)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        batch, _, height, width = x_BCHW.shape
        qkv = self.qkv(x_BCHW)
        heads = [self._attend(scale) for scale in (qkv, *(scale(qkv) for scale in self.scales))]
        attended = torch.cat(heads, dim=2).to(x_BCHW.dtype).view(batch, height, width, -1)
        y: Tensor = self.norm(self.project(attended.permute(0, 3, 1, 2)), x_BCHW)
        return y

    def _attend(self, qkv_BCHW: Tensor) -> Tensor:
        """Head-major [B, G·3·D, H, W] to [B, N, G, D] in fp32."""
        batch, _, height, width = qkv_BCHW.shape
        rows = qkv_BCHW.permute(0, 2, 3, 1)
        qkv_BNGC = rows.reshape(batch, height * width, -1, 3 * self.head_dim)
        q, k, v = qkv_BNGC.chunk(3, dim=-1)
        return relu_linear_attention_tokens(q, k, v)


class FusedDownsample(nn.Module):
    """`Downsample` with the shortcut added channel group by channel group."""

    def __init__(self, block: Downsample) -> None:
        super().__init__()
        self.conv = fast_conv(block.conv)
        self.unshuffle, self.shortcut = block.unshuffle, block.shortcut
        self.out_channels = block.out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H/2, W/2]."""
        y: Tensor = self.conv(x_BCHW)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        if not self.shortcut:
            return y
        group = 4 * x_BCHW.shape[1] // self.out_channels  # phases averaged into one channel
        if group not in (1, 2, 4):
            return y.add_(channel_average(x_BCHW, self.out_channels, 2))
        for index, (i, j) in enumerate(_PHASES):
            y[:, index // group :: 4 // group].add_(x_BCHW[:, :, i::2, j::2], alpha=1 / group)
        return y


class FusedUpsample(nn.Module):
    """`Upsample` whose convolution yields the four phases of the output as blocks of channels.

    The output is then written once, phase by phase, together with the shortcut.
    """

    def __init__(self, block: Upsample) -> None:
        super().__init__()
        self.out_channels, self.shortcut = block.out_channels, block.shortcut
        self.offset_phases = not block.shuffle
        self.conv = fast_conv(_phase_major(block.conv) if block.shuffle else _at_low(block.conv))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, 2H, 2W]."""
        batch, channels, height, width = x_BCHW.shape
        y: Tensor = self.conv(x_BCHW)
        out = y.new_empty(batch, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)
        repeats = 4 * self.out_channels // channels
        direct = self.shortcut and repeats in (1, 2, 4)
        for index, (i, j) in enumerate(_PHASES):
            phase = y[:, index * self.out_channels : (index + 1) * self.out_channels]
            if self.offset_phases:
                phase = phase[..., i : i + height, j : j + width]
            target = out[..., i::2, j::2]
            if direct:
                torch.add(phase, x_BCHW[:, index // repeats :: 4 // repeats], out=target)
            else:
                target.copy_(phase)
        if self.shortcut and not direct:
            out.add_(channel_duplicate(x_BCHW, self.out_channels, 2))
        return out


def _phase_major(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution before a pixel shuffle, with output channels sorted by phase."""
    assert conv.bias is not None
    conv.weight = nn.Parameter(_by_phase(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(_by_phase(conv.bias), requires_grad=False)
    return conv


def _by_phase(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _at_low(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution after nearest upsampling, as one that is computed before it."""
    assert conv.bias is not None
    phases = fold_phases(conv.weight)
    low = nn.Conv2d(conv.in_channels, len(phases), 2, padding=1, device="meta")
    low.weight = nn.Parameter(phases, requires_grad=False)
    low.bias = nn.Parameter(conv.bias.repeat(4), requires_grad=False)
    return low


def _fused_efficient_vit(block: EfficientViTBlock) -> nn.Module:
    return nn.Sequential(FusedLiteMLA(block.attention), FusedGLUMBConv(block.feed_forward))


def _in_place(activation: nn.ReLU | nn.SiLU) -> nn.Module:
    return type(activation)(inplace=True)


_INFERENCE_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ResBlock: FusedResBlock,
    EfficientViTBlock: _fused_efficient_vit,
    Downsample: FusedDownsample,
    Upsample: FusedUpsample,
    nn.Conv2d: fast_conv,
    RMSNorm2d: FusedRMSNorm2d,
    nn.ReLU: _in_place,
    nn.SiLU: _in_place,
}
