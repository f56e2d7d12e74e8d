"""Encoder and decoder of the VQGAN family (arXiv 2012.09841), as HART's tokenizer and VILA-U's
vision tower use them.

Levels are stored from fine to coarse on both sides. A level attends or not as a whole: after each
of its residual blocks, with one head over all positions. The decoder has one residual block per
level more than the encoder.
"""

# B batch   C channels   H height   W width   N = H·W positions   h, w latent height and width

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation over 32 groups of channels."""
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def attend_at(resolution: int, levels: int, attended: Sequence[int]) -> tuple[bool, ...]:
    """Which levels attend, where a configuration lists nominal resolutions.

    Args:
        resolution: of the finest level.
        levels: number of levels, each half as large as the one before.
        attended: resolutions with attention; such as no level has are passed over.
    """
    return tuple(resolution // 2**level in attended for level in range(levels))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3x3 convolution, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels_in), conv3(channels_in, channels_out)
        self.norm2, self.conv2 = group_norm(channels_out), conv3(channels_out, channels_out)
        self.dropout = nn.Dropout(dropout)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W], another C."""
        y: Tensor = self.conv1(F.silu(self.norm1(x_BCHW)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        shortcut: Tensor = self.shortcut(x_BCHW)
        return shortcut + y


class AttentionBlock(nn.Module):
    """One head over all positions, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W], unchanged in shape."""
        qkv: Tensor = self.qkv(self.norm(x_BCHW))
        # One head: (B, 1, N, C). With the head axis fused kernels need no B·N² buffer.
        q, k, v = (part.flatten(2).mT[:, None] for part in qkv.chunk(3, dim=1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x_BCHW.shape)
        out: Tensor = self.out(y)
        return x_BCHW + out


class Downsample(nn.Module):
    """Half the size: a 3x3 convolution of stride 2 on a picture padded right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2]."""
        y: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Twice the size: every position four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        y: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return y


class Level(nn.Module):
    """All blocks at one size, and the resampling behind them."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        blocks: int,
        *,
        attend: bool,
        resample: nn.Module | None,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * (blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(c, channels_out, dropout) for c in widths)
        self.attentions = nn.ModuleList(
            AttentionBlock(channels_out) for _ in range(blocks if attend else 0)
        )
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the next level's size."""
        for index, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if self.attentions:
                x_BCHW = self.attentions[index](x_BCHW)
        y: Tensor = self.resample(x_BCHW)
        return y


class Middle(nn.Module):
    """Block, attention, block at the coarsest size."""

    def __init__(self, channels: int, dropout: float, *, attend: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, dropout)
        self.attention = AttentionBlock(channels) if attend else nn.Identity()
        self.block2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W], unchanged in shape."""
        y: Tensor = self.block2(self.attention(self.block1(x_BCHW)))
        return y


class Encoder(nn.Module):
    """Picture to latent.

    Args:
        width: channels that the multipliers multiply, so that all are multiples of 32.
        multipliers: one per level, from fine to coarse.
        blocks: residual blocks per level.
        latent_channels: channels of the result.
        attend: one per level.
        middle_attention: whether the coarsest size attends once more, in the middle.
        image_channels: channels of the picture.
        dropout: in the residual blocks.
    """

    def __init__(
        self,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        latent_channels: int,
        attend: Sequence[bool],
        middle_attention: bool = True,
        image_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in multipliers]
        self.conv_in = conv3(image_channels, width)
        self.levels = nn.ModuleList(
            Level(
                before,
                own,
                blocks,
                attend=attends,
                resample=None if index == len(widths) - 1 else Downsample(own),
                dropout=dropout,
            )
            for index, (before, own, attends) in enumerate(
                zip([width, *widths[:-1]], widths, attend, strict=True)
            )
        )
        self.middle = Middle(widths[-1], dropout, attend=middle_attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3(widths[-1], latent_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, h, w], 2^(levels - 1) times smaller."""
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        z: Tensor = self.conv_out(F.silu(self.norm_out(self.middle(x_BCHW))))
        return z


class Decoder(nn.Module):
    """Latent to picture, not clamped; arguments as for `Encoder`.

    Every level has ``blocks + 1`` residual blocks. The levels run from coarse to fine.
    """

    def __init__(
        self,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        latent_channels: int,
        attend: Sequence[bool],
        middle_attention: bool = True,
        image_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in multipliers]
        self.conv_in = conv3(latent_channels, widths[-1])
        self.middle = Middle(widths[-1], dropout, attend=middle_attention)
        self.levels = nn.ModuleList(
            Level(
                before,
                own,
                blocks + 1,
                attend=attends,
                resample=Upsample(own) if index else None,
                dropout=dropout,
            )
            for index, (before, own, attends) in enumerate(
                zip([*widths[1:], widths[-1]], widths, attend, strict=True)
            )
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3(widths[0], image_channels)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 3, H, W], 2^(levels - 1) times larger."""
        x_BCHW: Tensor = self.middle(self.conv_in(z_BCHW))
        for level in reversed(self.levels):
            x_BCHW = level(x_BCHW)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return y
