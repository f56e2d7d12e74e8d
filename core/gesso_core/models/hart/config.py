"""Configuration of HART: what a checkpoint fixes (arXiv 2410.10812, section 3 and its code).

A published checkpoint describes itself in ``config.json`` with the authors' names. Flags that
change the arithmetic are read from there and never guessed: what is absent has the authors'
default, and the names of the weights must agree. A flag that is not known here is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from gesso_core.errors import ConfigError, InvalidRequest

Modulation = Literal["none", "pooled", "shared"]
Pooling = Literal["max", "avg"]

# Side of every scale by the side of the picture in pixels.
SCALES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

# The authors' name → ours, where the value is the same.
_RENAMED = {
    "context_token": "context_tokens",
    "context_dim": "context_channels",
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "heads",
    "mlp_ratio": "ffn_ratio",
    "norm_eps": "norm_eps",
    "attn_l2_norm": "attention_norm",
    "use_context_norm": "context_norm",
    "use_timestep_embed": "sinusoid_levels",
    "sep_aln_pooling_mode": "pooling",
    "cond_drop_rate": "text_dropout",
    "diff_width": "diffusion_width",
    "diff_depth": "diffusion_depth",
    "diffusion_batch_mul": "diffusion_repeats",
    "residual_range": "residual_range",
}
_DERIVED = {"patch_nums", "num_sampling_steps", "disable_aln", "shared_aln"}
# What the code here computes; other values name variants that no published checkpoint has.
_FIXED: dict[str, Any] = {
    "mlp_type": "llama",
    "attn_type": "llama",
    "use_cross_attn": False,
    "sampler": "iddpm",
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
}
# No effect on the arithmetic: paths, kernel choices, the scale of an initialisation, unused counts.
_IGNORED = {
    "vae_path", "flash_if_available", "fused_if_available", "context_norm_scale",
    "diffusion_head_repeats", "architectures", "model_type", "torch_dtype", "dtype",
    "transformers_version",
}  # fmt: skip
# A configuration that was saved by the authors' code leaves out what equals their defaults.
_DEFAULTS: dict[str, Any] = {
    "context_token": 77,
    "context_dim": 768,
    "depth": 16,
    "embed_dim": 1024,
    "num_heads": 16,
    "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "disable_aln": False,
    "shared_aln": False,
    "attn_l2_norm": False,
    "use_context_norm": False,
    "use_timestep_embed": False,
    "num_sampling_steps": "8",
}
_TELLING = {"patch_nums", "embed_dim", "depth", "diff_width", "context_dim"}


@dataclass(frozen=True, kw_only=True)
class HARTConfig:
    """Everything that fixes the shapes and the arithmetic of a HART transformer.

    Raises:
        ConfigError: when the fields contradict one another.
    """

    scales: tuple[int, ...]  # side of each square scale, not decreasing
    vocabulary: int  # codes of the tokenizer
    latent_channels: int  # C, channels of a code
    context_tokens: int  # L, text slots
    context_channels: int  # width of the text encoder
    width: int  # D
    depth: int  # number of blocks
    heads: int
    ffn_ratio: float = 4.0
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_norm: bool = False  # unit-norm queries and keys with a learned scale per head
    context_norm: bool = False  # RMSNorm of the text states
    sinusoid_levels: bool = True  # level embedding from a sinusoid, else a learned table
    modulation: Modulation = "none"  # adaptive norm of the blocks from the pooled text
    pooling: Pooling = "max"  # of the text, for the modulation "pooled"
    text_dropout: float = 0.1  # share of training samples without text
    diffusion_width: int = 1024
    diffusion_depth: int = 6
    diffusion_steps: int = 8
    diffusion_repeats: int = 4  # noise draws per token in training
    residual_range: float = 0.6  # largest residual, in units of the latent

    def __post_init__(self) -> None:
        for name in (
            "vocabulary", "latent_channels", "context_tokens", "context_channels", "width", "depth",
            "heads", "diffusion_width", "diffusion_depth", "diffusion_steps", "diffusion_repeats",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        check_scales(self.scales)
        if self.width % self.heads or self.head_dim % 4:
            raise ConfigError(
                f"width {self.width} in {self.heads} heads: heads must be equal, and a multiple of "
                "4 wide, which the two-dimensional rotation needs"
            )
        if self.modulation not in ("none", "pooled", "shared") or self.pooling not in (
            "max",
            "avg",
        ):
            raise ConfigError(f"unknown modulation {self.modulation!r} or pooling {self.pooling!r}")
        if not 0 <= self.text_dropout < 1 or self.residual_range <= 0:
            raise ConfigError(
                f"text_dropout {self.text_dropout} must be in [0, 1), residual_range "
                f"{self.residual_range} above 0"
            )

    @property
    def head_dim(self) -> int:
        """d, channels of a head."""
        return self.width // self.heads

    @property
    def ffn_hidden(self) -> int:
        """Hidden channels of the gated MLP: two thirds of the ratio, in whole 256s."""
        return int(self.width * self.ffn_ratio * 2 / 3 + 255) // 256 * 256

    @property
    def side(self) -> int:
        """Side of the largest scale, which is that of the latent."""
        return self.scales[-1]

    @property
    def visual_slots(self) -> int:
        """Slots behind the text: all scales but the first, which the last text slot predicts."""
        return sum(side * side for side in self.scales[1:])

    @property
    def slots(self) -> int:
        """All slots of a finished picture."""
        return self.context_tokens + self.visual_slots

    def cache_bytes(self, bytes_per_value: int) -> int:
        """Bytes of keys and values of one row at its full length."""
        return self.depth * 2 * self.width * self.slots * bytes_per_value

    @classmethod
    def from_original(
        cls, config: Mapping[str, Any], *, vocabulary: int, latent_channels: int
    ) -> "HARTConfig":
        """Read the ``config.json`` of the transformer folder.

        Args:
            config: its content.
            vocabulary: codes of the tokenizer beside it.
            latent_channels: channels of the tokenizer beside it.

        Raises:
            ConfigError: an unknown field, or a variant that is not supported.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        known = _RENAMED.keys() | _DERIVED | _FIXED.keys() | _IGNORED
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"unknown fields in the HART configuration: {unknown}")
        if not given.keys() & _TELLING:
            raise ConfigError(
                f"this is not the configuration of a HART transformer: none of {sorted(_TELLING)} "
                "is in it; give the config.json of the folder llm"
            )
        given = {**_DEFAULTS, **given}
        for key, value in _FIXED.items():
            if given.get(key, value) != value:
                raise ConfigError(f"{key} is {given[key]!r}; supported is {value!r}")
        fields = {_RENAMED[key]: value for key, value in given.items() if key in _RENAMED}
        return cls(
            scales=read_scales(given["patch_nums"]),
            vocabulary=vocabulary,
            latent_channels=latent_channels,
            modulation=_modulation(given["disable_aln"], given["shared_aln"]),
            diffusion_steps=int(given["num_sampling_steps"]),
            **fields,
        )

    def to_original(self) -> dict[str, Any]:
        """The ``config.json`` with the authors' names."""
        return {
            **{theirs: getattr(self, ours) for theirs, ours in _RENAMED.items()},
            **_FIXED,
            "patch_nums": list(self.scales),
            "num_sampling_steps": str(self.diffusion_steps),
            "disable_aln": self.modulation != "pooled",
            "shared_aln": self.modulation == "shared",
        }


def scales_for(size: int) -> tuple[int, ...]:
    """The published scales of pictures of ``size`` pixels per side.

    Raises:
        InvalidRequest: a size without a list.
    """
    if size not in SCALES:
        known = ", ".join(map(str, SCALES))
        raise InvalidRequest(
            f"no list of scales for {size} pixels; HART has lists for {known}", field="size"
        )
    return SCALES[size]


def read_scales(values: Any) -> tuple[int, ...]:
    """A list of scales from a configuration; a text such as ``1_2_3`` is understood as well."""
    if isinstance(values, str):
        values = [int(part) for part in values.split("_") if part.isdigit()]
    if not isinstance(values, Sequence):
        raise ConfigError(f"the scales are {values!r}; expected a list of whole numbers")
    scales = tuple(values)
    check_scales(scales)
    return scales


def check_scales(scales: tuple[int, ...]) -> None:
    """Scales start at 1 and do not decrease; there are at least two."""
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in scales)
    growing = whole and all(a <= b for a, b in pairwise(scales))
    if len(scales) < 2 or not growing or scales[0] != 1:
        raise ConfigError(
            f"the scales are {list(scales)}; expected at least two sides that do not decrease, the "
            "first of 1"
        )


def _modulation(disabled: Any, shared: Any) -> Modulation:
    if shared:
        return "shared"
    return "none" if disabled else "pooled"


HART_CONFIGS: dict[str, HARTConfig] = {
    # Which of the flags attention_norm and context_norm the weights use stands in their
    # config.json; these are the values that the list of their parameters was made with.
    "hart-0.7b-1024px": HARTConfig(
        scales=SCALES[1024],
        vocabulary=4096,
        latent_channels=32,
        context_tokens=300,
        context_channels=1536,
        width=1536,
        depth=24,
        heads=24,
        attention_norm=True,
        context_norm=True,
    ),
    # 64 px through an f16 autoencoder, whose latents have a std of 1; text of 576 channels.
    "hart-tiny": HARTConfig(
        scales=(1, 2, 3, 4),
        vocabulary=1024,
        latent_channels=32,
        context_tokens=20,
        context_channels=576,
        width=192,
        depth=6,
        heads=6,
        attention_norm=True,
        context_norm=True,
        diffusion_width=192,
        diffusion_depth=2,
        diffusion_repeats=1,
        residual_range=2.5,
    ),
}
