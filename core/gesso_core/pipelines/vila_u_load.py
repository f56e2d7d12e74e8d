"""A VILA-U pipeline from a model's name or its folder."""

import hashlib
from pathlib import Path
from typing import Final

import torch

from gesso_core.errors import WeightsError
from gesso_core.hub import DEFAULT_STORE, resolve, trained_dtype, weights_hash
from gesso_core.hub.checkpoint import MANIFEST
from gesso_core.hub.load_vila_u import (
    LLM,
    load_vila_u_model,
    load_vila_u_tokenizer,
    vila_u_config,
)
from gesso_core.hub.load_vila_u_tower import PROJECTOR_FOLDER, TOWER_FOLDER
from gesso_core.hub.quantized import weight_bytes
from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.model import VilaU
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.registry import ModelEntry, find
from gesso_core.safe_files import read_json

PARTS: Final = (LLM, TOWER_FOLDER, PROJECTOR_FOLDER)


def load_vila_u(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    store: Path = DEFAULT_STORE,
    name: str | None = None,
) -> VilaUPipeline:
    """All of VILA-U: it sees, answers, draws and judges.

    Args:
        name_or_folder: a registry name, or, as a `Path`, a folder in the published layout.
        dtype: by default what the weights were trained for on a GPU, float32 on a CPU.
        device: where it runs.
        store: where pulled models lie.
        name: what a folder shall be called, by default what it is called.

    Raises:
        WeightsError: not on this machine, damaged, or another kind of model.
    """
    folder = resolve(name_or_folder, store=store)
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise WeightsError(
            f"{folder} has no folder {', '.join(missing)}; a VILA-U is kept in the folders "
            f"{', '.join(PARTS)}"
        )
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else trained_dtype(folder / LLM)
    config = vila_u_config(folder)
    model = load_vila_u_model(folder, dtype, device)
    return VilaUPipeline(
        entry=_entry(name_or_folder, name, config),
        model=model,
        tokenizer=load_vila_u_tokenizer(folder, config),
        identity=_identity(folder, model),
    )


def _identity(folder: Path, model: VilaU) -> Identity:
    """The weights are known by the hashes of the three folders together."""
    revision = "shipped"
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        revision = str(manifest.get("commit") or manifest.get("revision") or revision)
    hashes = [weights_hash(folder / part) for part in PARTS]
    return Identity(
        revision=revision,
        weights_sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        weight_bytes=weight_bytes(model),
    )


def _entry(name_or_folder: str | Path, name: str | None, config: VilaUConfig) -> ModelEntry:
    """What the registry says, or, for a folder, what its configuration implies."""
    if not isinstance(name_or_folder, Path):
        entry = find(name_or_folder)
        if entry.family != "vila-u":
            raise WeightsError(f"{entry.name} is a {entry.family} model, expected a VILA-U")
        return entry
    video = ("text-to-video",) if config.video_frames else ()
    return ModelEntry(
        name=name or name_or_folder.name,
        family="vila-u",
        tasks=("image-to-text", "text-to-image", *video),
        summary=f"from {name_or_folder}",
        native_size=config.tower.decoded_size[0],
        sampler="next-token",
        steps=config.tower.grid[0],
        guidance_scale=3.0,
    )
