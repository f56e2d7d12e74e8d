"""A LoRA file: which layers it changes, by which factors, at which scale.

Three ways of writing keys are in use, and all are read:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight     PEFT and diffusers; also lora_B
    transformer_blocks.0.attn1.to_q.lora.down.weight              older diffusers; also lora.up
    lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight    kohya; also lora_up, and .alpha

The scale of a layer is ``alpha / rank`` where the file has an alpha, as ``….alpha`` or in the
metadata that diffusers writes, and 1 where it has none. A file is refused as a whole if anything in
it is not understood: a picture from half a LoRA is worse than an error.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.safe_files import header_of

MAX_RANK: Final = 1024
MAX_FILE_BYTES: Final = 1 << 30
METADATA_KEY: Final = "lora_adapter_metadata"
PREFIXES: Final = (
    "base_model.model.",
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
)
FLAT_PREFIXES: Final = ("lora_unet_", "lora_transformer_")

_DOWN = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"
_UP = r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_KEY = re.compile(
    rf"(?P<layer>.+)\.(?:(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_EXPECTED = "expected <layer>.lora_A.weight with <layer>.lora_B.weight, or lora_down with lora_up"
_HINTS = (
    (("lora_te", "text_encoder"), "LoRA of the text encoder is not supported"),
    (("hada_", "lokr_"), "LoHa and LoKr are not supported"),
    (("dora_scale", "lora_magnitude"), "DoRA is not supported"),
    (("lora_B.bias", "diff_b", ".diff"), "changes of biases and whole weights are not supported"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The factors of one layer. ``down`` (R, K) and ``up`` (N, R) as stored; ``key`` names them."""

    key: str
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The content of a file. Layers have the names of the file, without prefixes."""

    sha256: str
    pairs: Mapping[str, Pair]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(pair.down.nbytes + pair.up.nbytes for pair in self.pairs.values())


def read_adapter(path: Path) -> Adapter:
    """Read and check a LoRA file; hash and numbers are of the same bytes.

    Raises:
        UnsafeFile: a pickle.
        WeightsError: not a complete safetensors file, too large, or not a LoRA; names the key.
    """
    try:
        with path.open("rb") as file:  # not mapped: the file may be replaced while it is in use
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise WeightsError(
                f"{path.name} has {path.stat().st_size:,} bytes; a LoRA may have "
                f"{MAX_FILE_BYTES:,}, reduce its rank or store it in 16 bit"
            )
        header = header_of(path, data)
        tensors = load(data)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path.name} cannot be read ({error}); copy it again") from error
    scales = _Scales.from_metadata(header.get("__metadata__"), path.name)
    return Adapter(
        sha256=hashlib.sha256(data).hexdigest(), pairs=read_pairs(tensors, path.name, scales)
    )


@dataclass(frozen=True)
class _Scales:
    """Alphas from the metadata of diffusers: one for all layers, and exceptions by name."""

    alpha: float | None = None
    exceptions: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    @classmethod
    def from_metadata(cls, metadata: Any, file: str) -> "_Scales":
        """Read ``lora_adapter_metadata``; `WeightsError` where it is not what diffusers writes."""
        if METADATA_KEY not in (metadata or {}):
            return cls()
        try:
            facts = json.loads(metadata[METADATA_KEY])
            own = {k.removeprefix("transformer."): v for k, v in facts.items()}
            scales = cls(
                None if own.get("lora_alpha") is None else float(own["lora_alpha"]),
                {str(k): float(v) for k, v in (own.get("alpha_pattern") or {}).items()},
                bool(own.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{file}: its metadata {METADATA_KEY!r} is damaged ({error}); save the LoRA again"
            ) from error
        if own.get("use_dora"):
            raise WeightsError(f"{file} is a DoRA, which is not supported; train a plain LoRA")
        return scales

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """``alpha / rank``; the alpha beside the factors wins over the metadata."""
        if alpha is None:
            named = (a for n, a in self.exceptions.items() if layer == n or layer.endswith("." + n))
            alpha = next(named, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.rank_stabilized else rank)


def read_pairs(
    tensors: Mapping[str, Tensor], file: str, scales: _Scales | None = None
) -> dict[str, Pair]:
    """The factors by layer; `WeightsError` names the first key that is wrong."""
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}  # layer → half → (key, tensor)
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None:
            raise WeightsError(f"{file}: unknown key {_shown(key)}; {_hint(key)}")
        half = next(half for half in ("down", "up", "alpha") if match[half])
        parts = found.setdefault(without_prefix(match["layer"]), {})
        if half in parts:
            raise WeightsError(f"{file}: {_shown(key)} is the same as {_shown(parts[half][0])}")
        parts[half] = key, tensor
    if not found:
        raise WeightsError(f"{file} holds no tensor; {_EXPECTED}")
    known = scales or _Scales()
    return {layer: _pair(layer, parts, file, known) for layer, parts in sorted(found.items())}


def without_prefix(name: str) -> str:
    """A layer's name without what trainers put before it."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def _pair(layer: str, parts: Mapping[str, tuple[str, Tensor]], file: str, scales: _Scales) -> Pair:
    for half, missing in (("down", "lora_A or lora_down"), ("up", "lora_B or lora_up")):
        if half not in parts:
            given = _shown(next(iter(parts.values()))[0])
            raise WeightsError(f"{file}: {given} has no {missing} beside it; {_EXPECTED}")
    (down_key, down), (up_key, up) = parts["down"], parts["up"]
    down, up = _matrix(down_key, down, file), _matrix(up_key, up, file)
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise WeightsError(
            f"{file}: {_shown(up_key)} has rank {up.shape[1]}, but {_shown(down_key)} has {rank}; "
            "expected (outputs, rank) and (rank, inputs)"
        )
    if not 1 <= rank <= MAX_RANK:
        raise WeightsError(f"{file}: {_shown(down_key)} has rank {rank}, expected 1 to {MAX_RANK}")
    alpha = _alpha(*parts["alpha"], file) if "alpha" in parts else None
    return Pair(key=down_key, down=down, up=up, scale=scales.scale(layer, rank, alpha))


def _matrix(key: str, tensor: Tensor, file: str) -> Tensor:
    """A factor in two dimensions; a 1x1 convolution stores it in four."""
    if not tensor.is_floating_point():
        raise WeightsError(f"{file}: {_shown(key)} is {tensor.dtype}, expected floating point")
    shape = tuple(tensor.shape)
    if len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1)):
        raise WeightsError(
            f"{file}: {_shown(key)} has the shape {list(shape)}, "
            "expected a matrix or a 1x1 convolution"
        )
    if not tensor.isfinite().all():
        raise WeightsError(f"{file}: {_shown(key)} holds NaN or infinity; save the LoRA again")
    return tensor.reshape(shape[:2])


def _alpha(key: str, tensor: Tensor, file: str) -> float:
    if tensor.numel() != 1 or not isfinite(alpha := float(tensor)):
        raise WeightsError(f"{file}: {_shown(key)} must be one finite number")
    return alpha


def _hint(key: str) -> str:
    return next((hint for words, hint in _HINTS if any(word in key for word in words)), _EXPECTED)


def _shown(key: str) -> str:
    return repr(key if len(key) <= 160 else key[:160] + "…")
