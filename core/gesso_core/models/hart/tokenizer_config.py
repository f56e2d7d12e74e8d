"""Configuration of HART's tokenizer: autoencoder and multi-scale quantizer (arXiv 2410.10812, 3.1).

Reads and writes the ``config.json`` of the published tokenizer folder. A tokenizer may come without
an autoencoder of its own and quantize the scaled latents of another model; then ``autoencoder``
names that model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gesso_core.errors import ConfigError
from gesso_core.models.hart.quantizer import MultiScaleQuantizer, require_scales

CLASS_NAME = "HARTAutoEncoder"
# The authors' name → ours, where the value is the same.
_RENAMED = {
    "vocab_size": "vocabulary",
    "z_channels": "channels",
    "ch": "width",
    "ch_mult": "multipliers",
    "dropout": "dropout",
    "beta": "beta",
    "using_znorm": "cosine",
    "quant_conv_ks": "quant_kernel",
    "quant_resi": "phi_ratio",
    "share_quant_resi": "phi_sharing",
    "default_qresi_counts": "phi_count",
    "v_patch_nums": "scales",
    "num_res_blocks": "residual_blocks",
    "autoencoder": "autoencoder",
}
_TUPLES = ("ch_mult", "v_patch_nums")
# Choices that no published checkpoint varies: the values that the code here computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantizer_type": ("var_hybrid", "var"),
    "double_decoder": (False,),
}
# No effect on the arithmetic: what was trained, and notes of the library that wrote the file.
_IGNORED = {
    "hybrid", "freeze_codebook_for_hybrid", "test_mode", "architectures", "model_type",
    "torch_dtype", "dtype", "transformers_version",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HARTTokenizerConfig:
    """Everything that fixes the shapes and the arithmetic of a HART tokenizer.

    Raises:
        ConfigError: when the fields contradict one another.
    """

    vocabulary: int = 4096  # V, codes
    channels: int = 32  # C, of the latent and of a code
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # the last is the latent's side
    phi_ratio: float = 0.5
    phi_sharing: int = 4  # number of φ spread over the scales; 0: one for each
    phi_count: int = 0  # with phi_sharing 0: this many instead
    cosine: bool = False  # plain encoding matches by angle
    beta: float = 0.25  # weight of the commitment
    width: int = 160  # channels of the finest level of the autoencoder
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, in widths
    residual_blocks: int = 2  # per level of the encoder; the decoder has one more
    dropout: float = 0.0
    quant_kernel: int = 3  # of the convolutions around the quantizer
    autoencoder: str | None = None  # whose scaled latents are quantized; None: its own

    def __post_init__(self) -> None:
        require_scales(self.scales)
        for name in ("vocabulary", "channels", "width", "residual_blocks", "quant_kernel"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not self.multipliers or any(self.width * factor % 32 for factor in self.multipliers):
            raise ConfigError(
                f"width {self.width} times {self.multipliers}: every level needs a multiple of 32 "
                "channels, which its normalisation divides into 32 groups"
            )
        if not 0 <= self.dropout < 1 or self.quant_kernel % 2 == 0:
            raise ConfigError(
                f"dropout {self.dropout} must be in [0, 1), the kernel {self.quant_kernel} odd"
            )

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell, along one side, of its own autoencoder."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def latent_channels(self) -> int:
        """C, under the name that all autoencoders share."""
        return self.channels

    @classmethod
    def from_original(cls, values: Mapping[str, Any]) -> "HARTTokenizerConfig":
        """Read the published ``config.json``; absent keys take the authors' defaults.

        Raises:
            ConfigError: naming unknown keys, or values that this code does not compute.
        """
        known = {*_RENAMED, *_FIXED, *_IGNORED}
        if unknown := sorted(key for key in values if key not in known and key[:1] != "_"):
            raise ConfigError(
                f"unknown settings for a HART tokenizer: {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        for key, allowed in _FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ConfigError(f"{key} is {values[key]!r}; only {allowed} can be loaded")
        given = {key: values[key] for key in _RENAMED if key in values}
        for key in _TUPLES:
            if key in given:
                given[key] = tuple(given[key])
        return cls(**{_RENAMED[key]: value for key, value in given.items()})

    def to_original(self) -> dict[str, Any]:
        """The ``config.json`` of a published tokenizer folder."""
        named = {theirs: getattr(self, ours) for theirs, ours in _RENAMED.items()}
        if self.autoencoder is None:
            del named["autoencoder"]
        return {"_class_name": CLASS_NAME, **named, "quantizer_type": "var_hybrid", "hybrid": True}

    def build_quantizer(self) -> MultiScaleQuantizer:
        """A quantizer of this configuration, with random codes."""
        return MultiScaleQuantizer(
            vocabulary=self.vocabulary,
            channels=self.channels,
            scales=self.scales,
            phi_ratio=self.phi_ratio,
            phi_sharing=self.phi_sharing,
            phi_count=self.phi_count,
            cosine=self.cosine,
            beta=self.beta,
        )
