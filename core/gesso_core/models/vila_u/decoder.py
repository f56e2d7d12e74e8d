"""Pixel decoder of VILA-U's vision tower: the decoder of the VQGAN family with its sizes.

Attention sits where a level's nominal side is listed, whatever the side of the actual latent.
"""

from gesso_core.layers.vqgan import Decoder, attend_at
from gesso_core.models.vila_u.tower_config import DecoderConfig


def pixel_decoder(config: DecoderConfig) -> Decoder:
    """An untrained decoder: (B, z channels, h, w) to (B, 3, h·scale, w·scale), not clamped."""
    return Decoder(
        width=config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        latent_channels=config.z_channels,
        attend=attend_at(config.resolution, len(config.multipliers), config.attention_resolutions),
        image_channels=config.out_channels,
    )
