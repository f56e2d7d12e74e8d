"""Configuration of DC-AE (arXiv 2410.10733, section 3): the stages as rows of a table.

Reads and writes the ``config.json`` of diffusers, and reads the authors' settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gesso_core.errors import ConfigError

Block = Literal["ResBlock", "EfficientViTBlock"]
Norm = Literal["rms_norm", "batch_norm"]
Activation = Literal["relu", "silu"]
Downsampling = Literal["pixel_unshuffle", "conv"]
Upsampling = Literal["pixel_shuffle", "interpolate"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "block": ("ResBlock", "EfficientViTBlock"),
    "norm": ("rms_norm", "batch_norm"),
    "activation": ("relu", "silu"),
    "downsample": ("pixel_unshuffle", "conv"),
    "upsample": ("pixel_shuffle", "interpolate"),
    "decoder_out_activation": ("relu", "silu"),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """All blocks at one resolution."""

    width: int  # channels
    depth: int  # blocks; an empty stage is skipped together with its resampling
    block: Block = "ResBlock"
    scales: tuple[int, ...] = ()  # kernel sizes of the extra q/k/v scales of an EfficientViT block
    norm: Norm = "rms_norm"
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        _check_choices(self, "block", "norm", "activation")
        if self.width < 1 or self.depth < 0:
            raise ConfigError(f"a stage needs width >= 1 and depth >= 0, given {self}")
        if any(scale < 1 or scale % 2 == 0 for scale in self.scales):
            raise ConfigError(f"scales are odd kernel sizes, given {self.scales}")


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """A DC-AE: stages from the image (index 0) to the latent, for encoder and decoder."""

    latent_channels: int
    encoder: tuple[Stage, ...]
    decoder: tuple[Stage, ...]
    downsample: Downsampling = "pixel_unshuffle"
    upsample: Upsampling = "pixel_shuffle"
    scaling_factor: float = 1.0  # latent to diffusion space; applied by pipelines, never in here
    head_dim: int = 32
    image_channels: int = 3
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_out_activation: Activation = "relu"

    def __post_init__(self) -> None:
        _check_choices(self, "downsample", "upsample", "decoder_out_activation")
        if len(self.encoder) != len(self.decoder) or len(self.encoder) < 2:
            raise ConfigError(
                f"encoder and decoder need the same number of stages, at least 2; given "
                f"{len(self.encoder)} and {len(self.decoder)}"
            )
        for stage in (*self.encoder, *self.decoder):
            if stage.block == "EfficientViTBlock" and stage.depth and stage.width < self.head_dim:
                raise ConfigError(
                    f"an EfficientViT stage of width {stage.width} has no head of {self.head_dim}"
                )

    @property
    def spatial_compression_ratio(self) -> int:
        """f: pixels per latent cell, along one side."""
        return int(2 ** (len(self.encoder) - 1))

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> "DCAEConfig":
        """Read the ``config.json`` of a diffusers AutoencoderDC folder.

        Absent keys take that library's defaults; keys that start with an underscore are notes.

        Raises:
            ConfigError: naming unknown keys, or values that contradict each other.
        """
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(given.keys() - _DIFFUSERS_DEFAULTS.keys())
        if unknown:
            raise ConfigError(
                f"unknown settings for a DC-AE: {', '.join(unknown)}; "
                f"known: {', '.join(sorted(_DIFFUSERS_DEFAULTS))}"
            )
        v = {**_DIFFUSERS_DEFAULTS, **given}
        return cls(
            latent_channels=v["latent_channels"],
            encoder=_stages(v, "encoder"),
            decoder=_stages(v, "decoder", norm=v["decoder_norm_types"], act=v["decoder_act_fns"]),
            downsample=v["downsample_block_type"],
            upsample=v["upsample_block_type"],
            scaling_factor=float(v["scaling_factor"]),
            head_dim=v["attention_head_dim"],
            image_channels=v["in_channels"],
            encoder_out_shortcut=v["encoder_out_shortcut"],
            decoder_in_shortcut=v["decoder_in_shortcut"],
            decoder_out_activation=v["decoder_conv_act_fn"],
        )

    @classmethod
    def from_original(cls, values: Mapping[str, Any]) -> "DCAEConfig":
        """Read the nested settings of mit-han-lab/efficientvit: ``encoder.width_list``, …"""
        encoder, decoder = values["encoder"], values["decoder"]
        return cls(
            latent_channels=values["latent_channels"],
            encoder=_original_stages(encoder),
            decoder=_original_stages(decoder),
            downsample=_ORIGINAL[encoder.get("downsample_block_type", "ConvPixelUnshuffle")],
            upsample=_ORIGINAL[decoder.get("upsample_block_type", "ConvPixelShuffle")],
            scaling_factor=float(values.get("scaling_factor") or 1.0),
            image_channels=values.get("in_channels", 3),
            encoder_out_shortcut=encoder.get("out_shortcut", "averaging") is not None,
            decoder_in_shortcut=decoder.get("in_shortcut", "duplicating") is not None,
            decoder_out_activation=decoder.get("out_act", "relu"),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` of a diffusers AutoencoderDC folder."""
        sides = {"encoder": self.encoder, "decoder": self.decoder}
        per_stage: dict[str, Any] = {}
        for side, stages in sides.items():
            per_stage[f"{side}_block_types"] = [stage.block for stage in stages]
            per_stage[f"{side}_block_out_channels"] = [stage.width for stage in stages]
            per_stage[f"{side}_layers_per_block"] = [stage.depth for stage in stages]
            per_stage[f"{side}_qkv_multiscales"] = [list(stage.scales) for stage in stages]
        return {
            "_class_name": "AutoencoderDC",
            "in_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "attention_head_dim": self.head_dim,
            **per_stage,
            "upsample_block_type": self.upsample,
            "downsample_block_type": self.downsample,
            "decoder_norm_types": [stage.norm for stage in self.decoder],
            "decoder_act_fns": [stage.activation for stage in self.decoder],
            "encoder_out_shortcut": self.encoder_out_shortcut,
            "decoder_in_shortcut": self.decoder_in_shortcut,
            "decoder_conv_act_fn": self.decoder_out_activation,
            "scaling_factor": self.scaling_factor,
        }


_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}


def _check_choices(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value not in _CHOICES[name]:
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(_CHOICES[name])}")


def _stages(
    v: Mapping[str, Any], side: str, norm: Any = "rms_norm", act: Any = "silu"
) -> tuple[Stage, ...]:
    widths = v[f"{side}_block_out_channels"]
    columns = (
        widths,
        v[f"{side}_layers_per_block"],
        _column(v[f"{side}_block_types"], len(widths)),
        v[f"{side}_qkv_multiscales"],
        _column(norm, len(widths)),
        _column(act, len(widths)),
    )
    if len({len(column) for column in columns}) > 1:
        raise ConfigError(f"{side}: per-stage lists of unequal length, {len(widths)} widths")
    return tuple(
        Stage(width=w, depth=d, block=b, scales=tuple(s), norm=n, activation=a)
        for w, d, b, s, n, a in zip(*columns, strict=True)
    )


def _column(value: Any, length: int) -> Sequence[Any]:
    return [value] * length if isinstance(value, str) else value


_ORIGINAL: dict[str, Any] = {
    "ResBlock": ("ResBlock", ()),
    "EViT_GLU": ("EfficientViTBlock", ()),
    "EViTS5_GLU": ("EfficientViTBlock", (5,)),
    "trms2d": "rms_norm",
    "bn2d": "batch_norm",
    "ConvPixelUnshuffle": "pixel_unshuffle",
    "Conv": "conv",
    "ConvPixelShuffle": "pixel_shuffle",
    "InterpolateConv": "interpolate",
}


def _original_stages(v: Mapping[str, Any]) -> tuple[Stage, ...]:
    widths, count = v["width_list"], len(v["width_list"])
    blocks = [_ORIGINAL[block] for block in _column(v.get("block_type", "ResBlock"), count)]
    norms = [_ORIGINAL[norm] for norm in _column(v.get("norm", "trms2d"), count)]
    acts = _column(v.get("act", "silu"), count)
    return tuple(
        Stage(width=w, depth=d, block=b, scales=s, norm=n, activation=a)
        for w, d, (b, s), n, a in zip(widths, v["depth_list"], blocks, norms, acts, strict=True)
    )
