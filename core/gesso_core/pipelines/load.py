"""Text to image from a model's name or its folder: which files, which formats, which defaults."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from gesso_kernels.modes import Budget, Mode

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.hub import (
    DEFAULT_STORE,
    Parts,
    is_quantized,
    load_sana,
    quantized_from,
    require_its_autoencoder,
    resolve_parts,
    trained_dtype,
    weights_hash,
)
from gesso_core.hub.checkpoint import MANIFEST
from gesso_core.hub.load import dc_ae_config
from gesso_core.hub.quantized import load_quantized_sana, quantized_summary, weight_bytes
from gesso_core.models.dc_ae_config import DCAEConfig
from gesso_core.models.sana import Sana
from gesso_core.models.sana_config import SanaConfig
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.pipelines.denoiser import Denoiser, Identity
from gesso_core.pipelines.recipe import Canvas
from gesso_core.registry import ModelEntry, find
from gesso_core.safe_files import read_json
from gesso_core.sampling.aspect_ratio import aspect_table
from gesso_core.text import TextEncoder
from gesso_core.text.cache import CachedEncoder
from gesso_core.text.domain import Domain
from gesso_core.text.gemma2 import Gemma2Encoder
from gesso_core.text.smollm2 import SmolLM2Encoder

TEXT_STATS: Final = "text_stats.safetensors"
# From this size on, the hidden channels of the Mix-FFN are what fills the memory (0.4 GB a tensor).
CHUNKED_FROM: Final = 4096
CHUNKS: Final = 4


def load_denoiser(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    store: Path = DEFAULT_STORE,
    name: str | None = None,
    lora_folder: Path | None = None,
    quantized_mode: Mode | None = None,
    memory_budget: Budget = "8bit",
    cuda_graphs: bool = True,
) -> Denoiser:
    """Denoiser and text encoder; of the autoencoder only the configuration is read.

    ``dtype``: by default what the weights were trained for on a GPU, float32 on a CPU. ``name``
    is what a folder shall be called, by default what it is called. ``lora_folder`` has the files
    that a request may name in ``loras``. ``quantized_mode`` and ``memory_budget`` are for quantized
    weights (see `load_quantized_sana`); others are loaded as ever. ``cuda_graphs``: see `Denoiser`.
    """
    parts = resolve_parts(name_or_folder, store=store)
    require_its_autoencoder(parts.transformer, parts.autoencoder)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else trained_dtype(parts.transformer)
    if is_quantized(parts.transformer):
        model = load_quantized_sana(
            parts.transformer, mode=quantized_mode, budget=memory_budget, dtype=dtype, device=device
        )
    else:
        model = load_sana(parts.transformer, dtype).to(device)
    if device != "cpu":
        model.lay_out_for_kernels()
    canvas_config = dc_ae_config(parts.autoencoder)
    if model.config.sample_size * canvas_config.spatial_compression_ratio >= CHUNKED_FROM:
        model.chunk_ffn(CHUNKS)
    text_encoder = CachedEncoder(_load_text_encoder(parts, device))
    _check_fit(parts, model.config, canvas_config, text_encoder)
    return Denoiser(
        entry=_entry(name_or_folder, name, parts, model.config, canvas_config),
        model=model,
        text_encoder=text_encoder,
        canvas=Canvas(
            compression=canvas_config.spatial_compression_ratio,
            channels=canvas_config.latent_channels,
            patch=model.config.patch_size,
        ),
        scaling_factor=canvas_config.scaling_factor,
        identity=_identity(parts.transformer, model),
        domain=Domain.from_folder(parts.base, text_encoder),
        lora_folder=lora_folder,
        cuda_graphs=cuda_graphs,
    )


def load_its_autoencoder(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    store: Path = DEFAULT_STORE,
) -> Autoencoder:
    """The autoencoder of a text-to-image model; by default bfloat16 on a GPU, float32 on a CPU."""
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = resolve_parts(name_or_folder, store=store).autoencoder
    return Autoencoder.load(folder, dtype=dtype, device=device)


def _load_text_encoder(parts: Parts, device: str) -> TextEncoder:
    pipeline = parts.text_encoder
    folder = pipeline / "text_encoder" if (pipeline / "text_encoder").is_dir() else pipeline
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "smollm2-text-encoder":
        stats = parts.base / TEXT_STATS
        return SmolLM2Encoder.from_folder(folder, stats if stats.is_file() else None)
    if kind == "gemma2":
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return Gemma2Encoder.from_folder(pipeline, dtype=dtype, device=device)
    raise WeightsError(
        f"{folder} holds a text encoder of type {kind!r}; known are 'gemma2' and "
        "'smollm2-text-encoder'"
    )


def _check_fit(
    parts: Parts, sana: SanaConfig, dc_ae: DCAEConfig, text_encoder: TextEncoder
) -> None:
    if sana.in_channels != dc_ae.latent_channels:
        raise WeightsError(
            f"{parts.transformer} draws latents of {sana.in_channels} channels, but "
            f"{parts.autoencoder} decodes {dc_ae.latent_channels}; use its own autoencoder"
        )
    if sana.caption_channels != text_encoder.width:
        raise WeightsError(
            f"{parts.transformer} reads text states of {sana.caption_channels} channels, but "
            f"{parts.text_encoder} gives {text_encoder.width}; use its own text encoder"
        )


def _identity(transformer: Path, model: Sana) -> Identity:
    """Revision as recorded when the model was pulled; what ships has that of the package."""
    revision = "shipped"
    for folder in (transformer, transformer.parent):
        if (folder / MANIFEST).is_file():
            manifest = read_json(folder / MANIFEST)
            revision = str(manifest.get("commit") or manifest.get("revision") or revision)
            break
    summary = quantized_summary(model)
    return Identity(
        revision=revision,
        weights_sha256=weights_hash(transformer),
        quantization="none" if summary is None else str(summary),
        weight_bytes=weight_bytes(model),
    )


def _entry(
    name_or_folder: str | Path,
    name: str | None,
    parts: Parts,
    sana: SanaConfig,
    dc_ae: DCAEConfig,
) -> ModelEntry:
    """What the registry says, or, for a folder, what its configurations imply.

    A folder of quantized weights alone is used like the model that it was made from.
    """
    if not isinstance(name_or_folder, Path):
        return find(name_or_folder)
    if source := quantized_from(name_or_folder):
        return replace(
            source, name=name or name_or_folder.name, summary=f"from {name_or_folder}", shipped=None
        )
    size = sana.sample_size * dc_ae.spatial_compression_ratio
    entry = ModelEntry(
        name=name or name_or_folder.name,
        family="sana",
        tasks=("text-to-image",),
        summary=f"from {name_or_folder}",
        native_size=size,
        aspect_bins=size if _has_table(size) else None,
        shift=_flow_shift(parts.transformer.parent),
    )
    if not sana.guidance_embedding:
        return entry
    return replace(entry, sampler="scm", steps=2, shift=1.0)


def _has_table(size: int) -> bool:
    try:
        aspect_table(size)
    except ConfigError:
        return False
    return True


def _flow_shift(pipeline: Path) -> float:
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        return 3.0
    config = read_json(scheduler)
    return float(config.get("flow_shift") or config.get("shift") or 3.0)
