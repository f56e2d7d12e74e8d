"""Training profiles: everything that a run's size depends on, in one frozen dataclass."""

from dataclasses import dataclass, replace

from gesso_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes and budgets of one way to train the small models."""

    name: str
    size: int  # pixels per side of a picture
    sprite_size: int  # pixels per side of a stored sprite, a multiple of ``size``
    everyday: bool  # the denoiser learns the everyday concepts only, else all
    styles: int  # the denoiser learns this many of STYLES; the autoencoder sees all
    device: str
    autoencoder: str  # key of DC_AE_CONFIGS
    denoiser: str  # key of SANA_CONFIGS
    autoencoder_s: float  # wall-clock budget in seconds
    autoencoder_batch: int
    autoencoder_lr: float
    denoiser_s: float
    denoiser_batch: int
    denoiser_lr: float
    captions: int  # distinct (caption, picture) records with cached text states
    views: int  # augmented latents per (sprite, color)
    linear_start_pictures: int = 384
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        if self.sprite_size % self.size:
            raise ConfigError(
                f"sprites of {self.sprite_size} px cannot be area-averaged to {self.size} px; "
                "choose a multiple"
            )


CPU = Profile(
    name="cpu",
    size=64,
    sprite_size=128,
    everyday=True,
    styles=2,
    device="cpu",
    autoencoder="dcae-tiny",
    denoiser="sana-tiny",
    autoencoder_s=33 * 60,
    autoencoder_batch=16,
    autoencoder_lr=1e-3,
    denoiser_s=45 * 60,
    denoiser_batch=64,
    denoiser_lr=5e-3,
    captions=60_000,
    views=2,
)

PROFILES: dict[str, Profile] = {
    "cpu": CPU,
    # Seconds long: shows that every stage works, not what it can reach.
    "smoke": replace(
        CPU,
        name="smoke",
        everyday=False,
        autoencoder_s=3.0,
        autoencoder_batch=4,
        denoiser_s=3.0,
        denoiser_batch=8,
        captions=64,
        linear_start_pictures=32,
        save_every_s=1.0,
    ),
    "gpu": replace(
        CPU,
        name="gpu",
        size=128,
        everyday=False,
        styles=3,
        device="cuda",
        autoencoder_s=10 * 60,
        autoencoder_batch=256,
        autoencoder_lr=1.5e-3,
        denoiser_s=20 * 60,
        denoiser_batch=1024,
        captions=200_000,
        views=4,
    ),
}
