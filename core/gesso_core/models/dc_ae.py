"""DC-AE, the deep compression autoencoder (arXiv 2410.10733).

Residual autoencoding: every resampling block adds its convolution to a parameter-free, lossless
rearrangement of its input (space to channel, channel to space), so the network learns residuals
only. Deep stages use EfficientViT blocks with ReLU linear attention. Deterministic: no sampling, no
scaling factor, no clamping in here. Faster in the memory format ``channels_last``.
"""

# B batch   C channels   H height   W width   h, w latent height and width

from itertools import pairwise

from torch import Tensor, nn

from gesso_core.errors import InvalidRequest
from gesso_core.models.dc_ae_blocks import (
    ACTIVATIONS,
    Downsample,
    RMSNorm2d,
    Upsample,
    channel_average,
    channel_duplicate,
    conv3,
    make_blocks,
    require_divisible,
)
from gesso_core.models.dc_ae_config import DCAEConfig, Stage
from gesso_core.models.dc_ae_variants import DC_AE_CONFIGS

__all__ = ["DCAE", "DC_AE_CONFIGS", "DCAEConfig", "Decoder", "Encoder", "Stage"]


class Encoder(nn.Module):
    """Image to latent: stages from fine to coarse, each ending with a downsample."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages, kind = config.encoder, config.downsample
        self.latent_channels, self.shortcut = config.latent_channels, config.encoder_out_shortcut
        self.project_in: nn.Module = (
            conv3(config.image_channels, stages[0].width)
            if stages[0].depth
            else Downsample(config.image_channels, stages[1].width, kind, shortcut=False)
        )
        self.stages = nn.ModuleList()
        for stage, coarser in pairwise((*stages, None)):
            assert stage is not None
            blocks = make_blocks(stage, config.head_dim)
            if coarser is not None and blocks:
                blocks.append(Downsample(stage.width, coarser.width, kind, shortcut=True))
            self.stages.append(nn.Sequential(*blocks))
        if self.shortcut:
            require_divisible("the encoder shortcut", stages[-1].width, self.latent_channels)
        self.project_out = conv3(stages[-1].width, self.latent_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, H/f, W/f]."""
        x_BCHW = self.project_in(x_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        z: Tensor = self.project_out(x_BCHW)
        return z + channel_average(x_BCHW, self.latent_channels, 1) if self.shortcut else z


class Decoder(nn.Module):
    """Latent to image: stages run from coarse to fine, each starting with an upsample.

    They are stored in the order of the encoder, from fine to coarse.
    """

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages, kind = config.decoder, config.upsample
        self.width, self.shortcut = stages[-1].width, config.decoder_in_shortcut
        if self.shortcut:
            require_divisible("the decoder shortcut", self.width, config.latent_channels)
        self.project_in = conv3(config.latent_channels, self.width)
        self.stages = nn.ModuleList()
        for stage, coarser in pairwise((*stages, None)):
            assert stage is not None
            blocks = make_blocks(stage, config.head_dim)
            if coarser is not None and blocks:
                blocks.insert(0, Upsample(coarser.width, stage.width, kind, shortcut=True))
            self.stages.append(nn.Sequential(*blocks))
        finest = stages[0].width if stages[0].depth else stages[1].width
        self.norm_out = RMSNorm2d(finest)
        self.activation = ACTIVATIONS[config.decoder_out_activation]()
        self.project_out: nn.Module = (
            conv3(finest, config.image_channels)
            if stages[0].depth
            else Upsample(finest, config.image_channels, kind, shortcut=False)
        )

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 3, f·h, f·w]."""
        x: Tensor = self.project_in(z_BCHW)
        if self.shortcut:
            x = x + channel_duplicate(z_BCHW, self.width, 1)
        for stage in reversed(self.stages):
            x = stage(x)
        y: Tensor = self.project_out(self.activation(self.norm_out(x)))
        return y


class DCAE(nn.Module):
    """The autoencoder: ``encode`` an image in [-1, 1] to an unscaled latent, ``decode`` it back."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, H/f, W/f]; H and W must be multiples of f."""
        ratio = self.config.spatial_compression_ratio
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise InvalidRequest(
                f"a {width}x{height} image cannot be encoded: sides must be multiples of {ratio}; "
                f"pad or resize it"
            )
        z: Tensor = self.encoder(x_BCHW)
        return z

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 3, f·h, f·w], not clamped."""
        x: Tensor = self.decoder(z_BCHW)
        return x

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The reconstruction of an image."""
        return self.decode(self.encode(x_BCHW))
