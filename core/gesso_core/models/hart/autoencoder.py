"""The convolutional autoencoder of HART's tokenizer (arXiv 2410.10812, section 3.1).

A VQGAN encoder and decoder that attend at their coarsest level only, and a convolution on either
side of the quantizer. Deterministic; there is no scaling factor: its latents are what is quantized.
"""

# B batch   C latent channels   H height   W width   h, w latent height and width

from torch import Tensor, nn

from gesso_core.errors import InvalidRequest
from gesso_core.layers.vqgan import Decoder, Encoder
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig


class HARTAutoencoder(nn.Module):
    """Pictures in [-1, 1] to the latent f that is quantized; sums of codes to pictures."""

    def __init__(self, config: HARTTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.multipliers)
        attend = tuple(level == levels - 1 for level in range(levels))
        kernel, channels = config.quant_kernel, config.channels
        self.encoder = Encoder(
            width=config.width,
            multipliers=config.multipliers,
            blocks=config.residual_blocks,
            latent_channels=channels,
            attend=attend,
            dropout=config.dropout,
        )
        self.decoder = Decoder(
            width=config.width,
            multipliers=config.multipliers,
            blocks=config.residual_blocks,
            latent_channels=channels,
            attend=attend,
            dropout=config.dropout,
        )
        self.quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to f, [B, C, h, w]; H and W must be multiples of the compression.

        Raises:
            InvalidRequest: sides that are not.
        """
        ratio = self.config.spatial_compression_ratio
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise InvalidRequest(
                f"a {width}x{height} image cannot be encoded: sides must be multiples of {ratio}; "
                f"pad or resize it",
                field="image",
            )
        f: Tensor = self.quant_conv(self.encoder(x_BCHW))
        return f

    def decode(self, fhat_BChw: Tensor) -> Tensor:
        """[B, C, h, w] to pictures [B, 3, H, W], clamped to [-1, 1]."""
        return self.reconstruct(fhat_BChw).clamp(-1, 1)

    def reconstruct(self, fhat_BChw: Tensor) -> Tensor:
        """As `decode`, not clamped, which losses need."""
        x: Tensor = self.decoder(self.post_quant_conv(fhat_BChw))
        return x
