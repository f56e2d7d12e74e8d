"""A HART pipeline from a model's name or its folder.

A folder holds ``llm`` and ``tokenizer`` as published. What belongs to it and lies elsewhere, and
how it is best drawn from, a shipped model says in a ``config.json`` beside them; a published one in
the registry. A folder ``text_encoder`` comes first where there is one.
"""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch

from gesso_core.errors import WeightsError
from gesso_core.hub import DEFAULT_STORE, resolve, trained_dtype, weights_hash
from gesso_core.hub.checkpoint import MANIFEST, file_metadata, weight_files
from gesso_core.hub.load import dc_ae_config
from gesso_core.hub.load_hart import TRANSFORMER, hart_weights, load_hart_model
from gesso_core.hub.load_hart_tokenizer import HARTTokenizer, load_hart_tokenizer
from gesso_core.hub.quantized import weight_bytes
from gesso_core.models.hart.transformer import HART
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.hart import CountingEncoder, HartPipeline
from gesso_core.pipelines.hart_recipe import HartDefaults
from gesso_core.registry import MODELS, ModelEntry, find
from gesso_core.safe_files import read_json
from gesso_core.text.cache import CachedEncoder
from gesso_core.text.domain import Domain
from gesso_core.text.qwen2 import Qwen2Encoder
from gesso_core.text.smollm2 import SmolLM2Encoder

TOKENIZER: Final = "tokenizer"
TEXT_ENCODER: Final = "text_encoder"
TEXT_STATS: Final = "text_stats.safetensors"
GUIDANCE_SCALE: Final = 4.5


def load_hart(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    store: Path = DEFAULT_STORE,
    name: str | None = None,
    instruction_file: Path | None = None,
) -> HartPipeline:
    """Transformer, quantizer and text encoder; of another autoencoder only the configuration.

    Args:
        name_or_folder: a registry name, or, as a `Path`, a folder in the published layout.
        dtype: by default what the weights were trained for on a GPU, float32 on a CPU.
        device: where it runs.
        store: where pulled models lie.
        name: what a folder shall be called, by default what it is called.
        instruction_file: the text before prompts, for a Qwen2 encoder; see `Qwen2Encoder`.

    Raises:
        WeightsError: not on this machine, damaged, or parts that do not belong together.
    """
    folder = _whole(resolve(name_or_folder, store=store))
    if missing := [part for part in (TRANSFORMER, TOKENIZER) if not (folder / part).is_dir()]:
        raise WeightsError(
            f"{folder} has no folder {' and no '.join(missing)}; a HART is kept in the folders "
            f"{TRANSFORMER} and {TOKENIZER}"
        )
    if dtype is None:
        weights = hart_weights(folder / TRANSFORMER)
        dtype = torch.float32 if device == "cpu" else trained_dtype(weights)
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    tokenizer = load_hart_tokenizer(folder / TOKENIZER)
    model = load_hart_model(folder / TRANSFORMER, tokenizer, dtype).to(device)
    entry = _entry(name_or_folder, name, about, tokenizer)
    compression, scaling_factor = _canvas(folder, tokenizer, store)
    # Where text statistics and names of known things are kept; a shipped model shares them.
    base = resolve(str(about["base"]), store=store) if "base" in about else folder
    text_encoder = _text_encoder(folder, base, entry, device, store, instruction_file)
    _check_text(folder, model.config.context_channels, model.config.context_tokens, text_encoder)
    return HartPipeline(
        entry=entry,
        model=model,
        quantizer=tokenizer.quantizer.to(device),
        text_encoder=text_encoder,
        identity=_identity(folder, model),
        compression=compression,
        scaling_factor=scaling_factor,
        domain=Domain.from_folder(base, CachedEncoder(text_encoder)),
        defaults=_defaults(about),
    )


def _whole(folder: Path) -> Path:
    """The folder of the release, also where the one of its transformer was given."""
    beside = folder.parent / TOKENIZER
    return folder.parent if folder.name == TRANSFORMER and beside.is_dir() else folder


def _canvas(folder: Path, tokenizer: HARTTokenizer, store: Path) -> tuple[int, float]:
    """Pixels per side of a latent cell, and the factor from the autoencoder's latents to these."""
    name = tokenizer.config.autoencoder
    if name is None:
        return tokenizer.config.spatial_compression_ratio, 1.0
    autoencoder = resolve(name, store=store)
    stated = file_metadata(weight_files(folder / TOKENIZER).files[0]).get("autoencoder_sha256")
    if stated and stated != weights_hash(autoencoder):
        raise WeightsError(
            f"{folder} quantizes the latents of the autoencoder {stated[:12]}…, but {name} is "
            f"{weights_hash(autoencoder)[:12]}…; use the two of one release"
        )
    config = dc_ae_config(autoencoder)
    return config.spatial_compression_ratio, config.scaling_factor


def _text_encoder(
    folder: Path,
    base: Path,
    entry: ModelEntry,
    device: str,
    store: Path,
    instruction_file: Path | None,
) -> CountingEncoder:
    place = folder / TEXT_ENCODER
    if not place.is_dir():
        if not entry.text_encoder:
            raise WeightsError(
                f"{folder} names no text encoder; put that of the release into {place}"
            )
        place = resolve(entry.text_encoder, store=store)
    kind = read_json(place / "config.json").get("model_type")
    if kind == "smollm2-text-encoder":
        stats = base / TEXT_STATS
        return SmolLM2Encoder.from_folder(place, stats if stats.is_file() else None)
    if kind in ("qwen2", "qwen2_vl"):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return Qwen2Encoder.from_folder(
            place, dtype=dtype, device=device, instruction_file=instruction_file
        )
    raise WeightsError(
        f"{place} holds a text encoder of type {kind!r}; known are 'qwen2' and "
        "'smollm2-text-encoder'"
    )


def _check_text(folder: Path, width: int, tokens: int, text_encoder: CountingEncoder) -> None:
    found = text_encoder.width, text_encoder.max_tokens
    if found != (width, tokens):
        raise WeightsError(
            f"{folder} reads {tokens} text states of {width} channels, but its text encoder gives "
            f"{found[1]} of {found[0]}; use its own text encoder"
        )


def _identity(folder: Path, model: HART) -> Identity:
    """The weights are known by the hashes of both folders together."""
    revision = "shipped"
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        revision = str(manifest.get("commit") or manifest.get("revision") or revision)
    places = (hart_weights(folder / TRANSFORMER), folder / TOKENIZER)
    hashes = "\n".join(weights_hash(place) for place in places)
    return Identity(
        revision=revision,
        weights_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        weight_bytes=weight_bytes(model),
    )


def _defaults(about: dict[str, Any]) -> HartDefaults:
    return HartDefaults(**{f.name: about[f.name] for f in fields(HartDefaults) if f.name in about})


def _entry(
    name_or_folder: str | Path,
    name: str | None,
    about: dict[str, Any],
    tokenizer: HARTTokenizer,
) -> ModelEntry:
    """What the registry says, or, for a folder, what its configurations imply."""
    if not isinstance(name_or_folder, Path):
        entry = find(name_or_folder)
        if entry.family != "hart":
            raise WeightsError(f"{entry.name} is a {entry.family} model, expected a HART")
        return entry
    config = tokenizer.config
    compression = config.spatial_compression_ratio
    if config.autoencoder is not None:
        compression = dc_ae_config(resolve(config.autoencoder)).spatial_compression_ratio
    text_encoder = str(about.get("text_encoder", ""))
    return ModelEntry(
        name=name or name_or_folder.name,
        family="hart",
        tasks=("text-to-image",),
        summary=f"from {name_or_folder}",
        autoencoder=config.autoencoder or "",
        text_encoder=text_encoder if text_encoder in MODELS else "",
        native_size=config.scales[-1] * compression,
        sampler="next-scale",
        steps=len(config.scales),
        guidance_scale=float(about.get("guidance_scale", GUIDANCE_SCALE)),
    )
