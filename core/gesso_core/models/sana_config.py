"""Configurations of Sana: what a checkpoint fixes, and the published ones by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gesso_core.errors import ConfigError

_QK_NORM = "rms_norm_across_heads"

# diffusers' name → ours, where the value is the same.
_RENAMED = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "attention_head_dim": "head_dim",
    "num_layers": "depth",
    "num_cross_attention_heads": "cross_heads",
    "cross_attention_head_dim": "cross_head_dim",
    "caption_channels": "caption_channels",
    "mlp_ratio": "ffn_ratio",
    "attention_bias": "attention_bias",
    "sample_size": "sample_size",
    "patch_size": "patch_size",
    "norm_eps": "norm_eps",
    "interpolation_scale": "interpolation_scale",
    "guidance_embeds": "guidance_embedding",
    "guidance_embeds_scale": "guidance_embeds_scale",
    "timestep_scale": "timestep_scale",
}
_DERIVED = {"num_attention_heads", "cross_attention_dim", "qk_norm"}
_FIXED: dict[str, Any] = {"norm_elementwise_affine": False}
_IGNORED = {"dropout"}  # has no effect on inference, and training of Sana uses none


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    """Everything that fixes the shapes and the arithmetic of a Sana model.

    Raises:
        ConfigError: when the fields contradict one another.
    """

    width: int  # D, channels of a token
    depth: int  # number of blocks
    cross_heads: int
    cross_head_dim: int
    caption_channels: int  # width of the text encoder
    sample_size: int  # side of the latent that the model was trained at
    head_dim: int = 32  # of the linear self-attention
    in_channels: int = 32  # latent channels
    out_channels: int = 32
    patch_size: int = 1  # latent pixels per side of a token
    ffn_ratio: float = 2.5
    interpolation_scale: float | None = None  # None: no position table
    qk_norm: bool = False  # RMSNorm of queries and keys over the full width (1.5 and Sprint)
    attention_bias: bool = False  # bias of the self-attention's q, k and v
    guidance_embedding: bool = False  # Sprint: the guidance scale is an input
    guidance_embeds_scale: float = 0.1  # factor that the guidance scale is given to the model with
    timestep_scale: float = 1.0  # factor that times are given to the model with
    norm_eps: float = 1e-6
    cross_norm_eps: float = 1e-5  # 1e-6 in the authors' code
    linear_attention_eps: float = 1e-15  # 1e-8 in the authors' code

    def __post_init__(self) -> None:
        for name in (
            "width", "depth", "cross_heads", "cross_head_dim", "caption_channels", "sample_size",
            "head_dim", "in_channels", "out_channels", "patch_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.width % self.head_dim:
            raise ConfigError(
                f"width {self.width} is not a multiple of head_dim {self.head_dim}; "
                "self-attention splits the width into heads"
            )
        if self.width % 4 and self.interpolation_scale is not None:
            raise ConfigError(f"width {self.width} must be a multiple of 4 for a position table")
        if self.sample_size % self.patch_size:
            raise ConfigError(
                f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.ffn_hidden < 1:
            raise ConfigError(f"ffn_ratio {self.ffn_ratio} leaves no channel of width {self.width}")
        if self.interpolation_scale is not None and self.interpolation_scale <= 0:
            raise ConfigError(f"interpolation_scale {self.interpolation_scale} must be positive")

    @property
    def heads(self) -> int:
        """Heads of the self-attention."""
        return self.width // self.head_dim

    @property
    def ffn_hidden(self) -> int:
        """Hidden channels of the Mix-FFN, before they are doubled for the gate."""
        return int(self.ffn_ratio * self.width)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "SanaConfig":
        """Read the ``config.json`` of a diffusers transformer folder.

        Raises:
            ConfigError: a missing or unknown field, or a value that Sana does not have.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = given.keys() - _RENAMED.keys() - _DERIVED - _FIXED.keys() - _IGNORED
        if unknown:
            raise ConfigError(f"unknown fields in the Sana configuration: {sorted(unknown)}")
        needed = {"num_attention_heads", "attention_head_dim", "num_layers", "sample_size"}
        needed |= {"num_cross_attention_heads", "cross_attention_head_dim", "caption_channels"}
        if missing := needed - given.keys():
            raise ConfigError(f"the Sana configuration lacks {sorted(missing)}")
        for key, value in _FIXED.items():
            if given.get(key, value) != value:
                raise ConfigError(f"{key} is {given[key]!r}; Sana models have {value!r}")
        if given.get("qk_norm") not in (None, _QK_NORM):
            raise ConfigError(f"qk_norm is {given['qk_norm']!r}; it must be null or {_QK_NORM!r}")
        width = given["num_attention_heads"] * given["attention_head_dim"]
        if given.get("cross_attention_dim", width) != width:
            raise ConfigError(
                f"cross_attention_dim is {given['cross_attention_dim']}, but the text is projected "
                f"to the width {width}"
            )
        fields = {_RENAMED[key]: value for key, value in given.items() if key in _RENAMED}
        if fields.get("out_channels", 0) is None:
            fields["out_channels"] = fields.get("in_channels", 32)
        return cls(width=width, qk_norm=given.get("qk_norm") is not None, **fields)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers would write, without its private fields."""
        fields = {theirs: getattr(self, ours) for theirs, ours in _RENAMED.items()}
        return {
            "_class_name": "SanaTransformer2DModel",
            **fields,
            **_FIXED,
            "dropout": 0.0,
            "num_attention_heads": self.heads,
            "cross_attention_dim": self.width,
            "qk_norm": _QK_NORM if self.qk_norm else None,
        }


_SANA_600M = SanaConfig(
    width=1152, depth=28, cross_heads=16, cross_head_dim=72, caption_channels=2304, sample_size=32
)
_SANA_1600M = replace(_SANA_600M, width=2240, depth=20, cross_heads=20, cross_head_dim=112)

SANA_CONFIGS: dict[str, SanaConfig] = {
    "sana-0.6b-512": replace(_SANA_600M, sample_size=16),
    "sana-0.6b-1024": _SANA_600M,
    "sana-1.6b-512": replace(_SANA_1600M, sample_size=16),
    "sana-1.6b-1024": _SANA_1600M,
    "sana-1.6b-2k": replace(_SANA_1600M, sample_size=64, interpolation_scale=1.0),
    "sana-1.6b-4k": replace(_SANA_1600M, sample_size=128, interpolation_scale=2.0),
    "sana-1.5-1.6b": replace(_SANA_1600M, qk_norm=True),
    "sana-1.5-4.8b": replace(_SANA_1600M, qk_norm=True, depth=60),
    "sana-sprint-0.6b": replace(_SANA_600M, qk_norm=True, guidance_embedding=True),
    "sana-sprint-1.6b": replace(_SANA_1600M, qk_norm=True, guidance_embedding=True),
    # 64 px through an f16 autoencoder: 4x4 tokens, text from a 576-channel encoder.
    "sana-tiny": SanaConfig(
        width=160,
        depth=8,
        cross_heads=5,
        cross_head_dim=32,
        caption_channels=576,
        sample_size=4,
        interpolation_scale=1.0,
        qk_norm=True,
    ),
}
