"""Configuration of VILA-U's vision tower: SigLIP encoder, residual quantizer, pixel decoder.

Reads and writes the ``rqvaesiglip`` entry of a published ``vision_tower/config.json``. That entry
only names the SigLIP model, so its sizes are kept here. Picture size and grid are fields; nothing
is concluded from a width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from gesso_core.errors import ConfigError

DECODER_KEYS: Final = {
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult",
    "num_res_blocks", "attn_resolutions", "dropout",
}  # fmt: skip
NORM_GROUPS: Final = 32


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a SigLIP vision transformer, under the names that transformers gives them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # the last one is used by the contrastive branch only
    num_attention_heads: int
    image_size: int  # pixels per side
    patch_size: int
    num_channels: int = 3

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_hidden_layers < 2:
            raise ConfigError(
                f"an encoder of width {self.hidden_size} with {self.num_attention_heads} heads and "
                f"{self.num_hidden_layers} layers; the heads must divide the width, and features "
                "come from the layer before the last, so at least 2 are needed"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"pictures of {self.image_size} px hold no patch of {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches per side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size


# google/siglip-large-patch16-256 and google/siglip-so400m-patch14-384, vision part.
SIGLIP_LARGE_256: Final = EncoderConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=256, patch_size=16,
)  # fmt: skip
SIGLIP_SO400M_384: Final = EncoderConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
    image_size=384, patch_size=14,
)  # fmt: skip
SIGLIP_MODELS: Final = {
    "google/siglip-large-patch16-256": SIGLIP_LARGE_256,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M_384,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A convolutional decoder of the VQGAN family; levels from the picture (0) to the latent."""

    z_channels: int
    resolution: int  # nominal side of the picture; decides where attention is, not what is decoded
    width: int  # channels of level 0, before its multiplier
    multipliers: tuple[int, ...]  # one per level
    blocks: int  # residual blocks per level, less one
    attention_resolutions: tuple[int, ...]  # nominal sides of the levels that have attention
    out_channels: int = 3

    def __post_init__(self) -> None:
        odd = [self.width * m for m in self.multipliers if self.width * m % NORM_GROUPS]
        if odd or not self.multipliers or self.blocks < 0:
            raise ConfigError(
                f"a decoder of width {self.width}, multipliers {self.multipliers} and "
                f"{self.blocks} blocks; every level needs a multiple of {NORM_GROUPS} channels"
            )

    @property
    def scale(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The whole tower: pictures to codes, codes to features, features to pictures."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    latent_shape: tuple[int, int, int]  # H, W, C of the encoder's output
    code_shape: tuple[int, int, int]  # h, w, D
    codebook_size: int | tuple[int, ...]  # K
    shared_codebook: bool = True
    restart_unused_codes: bool = True
    decay: float = 0.99
    commitment_weight: float = 0.25
    decoder_latent_shape: tuple[int, int] | None = None  # resized to this before decoding

    def __post_init__(self) -> None:
        grid, width = self.encoder.grid, self.encoder.hidden_size
        if self.latent_shape != (grid, grid, width):
            raise ConfigError(
                f"a latent of {self.latent_shape}, but the encoder gives {(grid, grid, width)}; "
                "the encoder named in the configuration is not the one of this tower",
                field="latent_shape",
            )

    @property
    def image_size(self) -> int:
        """Pixels per side of the pictures that go in."""
        return self.encoder.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Code cells: rows and columns."""
        return self.code_shape[:2]

    @property
    def positions(self) -> int:
        """Code cells per picture, which are the visual tokens of the language model."""
        return self.code_shape[0] * self.code_shape[1]

    @property
    def depth(self) -> int:
        """D: codes per cell."""
        return self.code_shape[2]

    @property
    def width(self) -> int:
        """Channels of the features of a code cell."""
        cells = self.latent_shape[0] * self.latent_shape[1] // self.positions
        return self.latent_shape[2] * cells

    @property
    def decoded_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that come out."""
        rows, columns = self.decoder_latent_shape or self.latent_shape[:2]
        return rows * self.decoder.scale, columns * self.decoder.scale

    @classmethod
    def from_original(cls, values: Mapping[str, Any]) -> "TowerConfig":
        """Read the ``rqvaesiglip`` entry of a published configuration.

        ``pretrained_model`` is a known SigLIP name, or an object with ``vision_config``.

        Raises:
            ConfigError: a missing or unknown entry.
        """
        try:
            picture, size = values["ddconfig"], values["n_embed"]
            resized = values.get("decoder_latent_shape")
            height, width, channels = values["latent_shape"]
            rows, columns, depth = values["code_shape"]
            return cls(
                encoder=_encoder(values["pretrained_model"]),
                decoder=_decoder(picture),
                latent_shape=(height, width, channels),
                code_shape=(rows, columns, depth),
                codebook_size=size if isinstance(size, int) else tuple(size),
                shared_codebook=bool(values["shared_codebook"]),
                restart_unused_codes=bool(values.get("restart_unused_codes", True)),
                decay=float(values.get("decay", 0.99)),
                commitment_weight=float(values.get("latent_loss_weight", 0.25)),
                decoder_latent_shape=None if resized is None else (resized[0], resized[1]),
            )
        except KeyError as missing:
            raise ConfigError(
                f"the vision tower's configuration has no {missing}; give the config.json of the "
                "folder 'vision_tower'"
            ) from missing

    def to_original(self) -> dict[str, Any]:
        """The ``rqvaesiglip`` entry of a configuration file; the encoder is written out."""
        size, decoder, resized = self.codebook_size, self.decoder, self.decoder_latent_shape
        encoder = {field.name: getattr(self.encoder, field.name) for field in fields(self.encoder)}
        return {
            "embed_dim": self.latent_shape[2],
            "n_embed": size if isinstance(size, int) else list(size),
            "latent_shape": list(self.latent_shape),
            "code_shape": list(self.code_shape),
            "shared_codebook": self.shared_codebook,
            "restart_unused_codes": self.restart_unused_codes,
            "decay": self.decay,
            "latent_loss_weight": self.commitment_weight,
            "decoder_latent_shape": None if resized is None else list(resized),
            "ddconfig": {
                "double_z": False,
                "z_channels": decoder.z_channels,
                "resolution": decoder.resolution,
                "in_channels": 3,
                "out_ch": decoder.out_channels,
                "ch": decoder.width,
                "ch_mult": list(decoder.multipliers),
                "num_res_blocks": decoder.blocks,
                "attn_resolutions": list(decoder.attention_resolutions),
                "dropout": 0.0,
            },
            "pretrained_model": {"vision_config": encoder},
        }


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Read a ``ddconfig``.

    Raises:
        ConfigError: a key that is missing, or one whose meaning is unknown.
    """
    if unknown := values.keys() - DECODER_KEYS:
        raise ConfigError(
            f"unknown decoder settings {sorted(unknown)}; known: {sorted(DECODER_KEYS)}"
        )
    if values.get("double_z"):
        raise ConfigError("double_z asks for a variational latent; the tower quantizes instead")
    return DecoderConfig(
        z_channels=values["z_channels"],
        resolution=values["resolution"],
        width=values["ch"],
        multipliers=tuple(values["ch_mult"]),
        blocks=values["num_res_blocks"],
        attention_resolutions=tuple(values["attn_resolutions"]),
        out_channels=values["out_ch"],
    )


def _decoder(values: Any) -> DecoderConfig:
    if not isinstance(values, Mapping):
        raise ConfigError(f"'ddconfig' is {type(values).__name__}, expected an object")
    return decoder_config(values)


def _encoder(named: Any) -> EncoderConfig:
    if isinstance(named, str):
        if named not in SIGLIP_MODELS:
            raise ConfigError(
                f"the encoder {named[:80]!r} is not known; known: {', '.join(SIGLIP_MODELS)}; "
                "or write its vision_config into 'pretrained_model'",
                field="pretrained_model",
            )
        return SIGLIP_MODELS[named]
    if not isinstance(named, Mapping) or "vision_config" not in named:
        raise ConfigError("'pretrained_model' is neither a name nor an object with 'vision_config'")
    known = {field.name for field in fields(EncoderConfig)}
    return EncoderConfig(**{k: v for k, v in named["vision_config"].items() if k in known})


VILA_U_256: Final = TowerConfig(
    encoder=SIGLIP_LARGE_256,
    decoder=DecoderConfig(
        z_channels=256,
        resolution=256,
        width=128,
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention_resolutions=(16,),
    ),
    latent_shape=(16, 16, 1024),
    code_shape=(16, 16, 4),
    codebook_size=16384,
)
# The decoder of the 384 px model is assumed to be that of the 256 px one, fed with a 24x24 latent.
VILA_U_384: Final = TowerConfig(
    encoder=SIGLIP_SO400M_384,
    decoder=DecoderConfig(
        z_channels=256,
        resolution=384,
        width=128,
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention_resolutions=(24,),
    ),
    latent_shape=(27, 27, 1152),
    code_shape=(27, 27, 16),
    codebook_size=16384,
    decoder_latent_shape=(24, 24),
)
VILAU_TINY: Final = TowerConfig(
    encoder=EncoderConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=64,
        patch_size=16,
    ),
    decoder=DecoderConfig(
        z_channels=128,
        resolution=64,
        width=32,
        multipliers=(1, 1, 2, 4, 4),
        blocks=0,
        attention_resolutions=(),
    ),
    latent_shape=(4, 4, 192),
    code_shape=(4, 4, 8),
    codebook_size=1024,
)
TOWERS: Final = {"vila-u-256": VILA_U_256, "vila-u-384": VILA_U_384, "vilau-tiny": VILAU_TINY}
