"""Vision towers of VILA-U that are small enough for tests."""

from gesso_core.models.vila_u.tower_config import DecoderConfig, EncoderConfig, TowerConfig

WIDTH = 32


def small_tower(
    *,
    size: int,
    patch: int,
    codes: int,
    entries: int,
    layers: int = 3,
    hidden: int = 48,
    latent: int = 16,
    attention: tuple[int, ...] = (),
) -> TowerConfig:
    """A tower for pictures of ``size`` pixels, with ``codes`` codes for each patch."""
    grid = size // patch
    return TowerConfig(
        encoder=EncoderConfig(
            hidden_size=WIDTH,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=size,
            patch_size=patch,
        ),
        decoder=DecoderConfig(
            z_channels=latent,
            resolution=size,
            width=WIDTH,
            multipliers=(1,) * patch.bit_length(),  # every level but the first doubles the side
            blocks=0,
            attention_resolutions=attention,
        ),
        latent_shape=(grid, grid, WIDTH),
        code_shape=(grid, grid, codes),
        codebook_size=entries,
    )
