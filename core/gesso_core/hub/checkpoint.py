"""State dicts from folders: one safetensors file or shards with an index, read strictly.

A checkpoint is a folder in the diffusers layout (``config.json`` beside
``diffusion_pytorch_model.safetensors``), or one safetensors file. Which number format the weights
were trained for is part of the checkpoint: see `trained_dtype`. A folder of quantized weights has
the canonical file instead (`gesso_core.quant.canonical`); it is found here, and loaded there.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.quant.canonical import CANONICAL_FILE, read_about
from gesso_core.safe_files import PICKLE_SUFFIXES, inside, read_header, read_json, read_tensors

STEMS: Final = ("diffusion_pytorch_model", "model")
VARIANTS: Final = (None, "fp16", "bf16")
FLOATS: Final = {"F64", "F32", "F16", "BF16"}
DTYPES: Final = {
    "float32": torch.float32, "fp32": torch.float32, "F32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "F16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "BF16": torch.bfloat16,
}  # fmt: skip
MANIFEST: Final = "gesso_manifest.json"


@dataclass(frozen=True)
class WeightFiles:
    """The files of one state dict; ``keys`` names the keys of each file as the index has them."""

    files: tuple[Path, ...]
    variant: str | None = None
    keys: dict[Path, frozenset[str]] | None = None


def load_state_dict(
    path: Path, variant: str | None = None, *, skip: Collection[str] = ()
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, exactly as stored.

    Args:
        path: a model folder, or one safetensors file.
        variant: ``"fp16"`` or ``"bf16"`` to choose between files of one folder.
        skip: names of tensors, such as large buffers, that are not even read.

    Raises:
        WeightsError: a missing or truncated file, a shard that contradicts its index, a tensor
            that is not floating point.
        UnsafeFile: a pickle, or a name that leads out of the folder.
    """
    found = weight_files(path, variant)
    if found.files[0].name == CANONICAL_FILE:
        raise WeightsError(
            f"{path} holds quantized weights; load them with load_quantized_sana, or give the "
            "folder of the 16-bit model"
        )
    state: dict[str, Tensor] = {}
    for file in found.files:
        tensors = _tensors(file, skip)
        _compare_with_index(file, tensors.keys() | (read_header(file).keys() & set(skip)), found)
        if doubled := sorted(state.keys() & tensors.keys()):
            raise WeightsError(f"{file} repeats {_some(doubled)}, already in another shard")
        state |= tensors
    return state


def weight_files(path: Path, variant: str | None = None) -> WeightFiles:
    """Find the weight file or shards of a folder; several variants and no choice is an error."""
    if path.is_file():
        return WeightFiles((path,))
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist; expected a model folder or a safetensors file")
    if is_quantized(path):
        return WeightFiles((path / CANONICAL_FILE,))
    wanted = VARIANTS if variant is None else (variant,)
    found = [files for choice in wanted if (files := _of_variant(path, choice))]
    if not found:
        raise WeightsError(_nothing_found(path, variant))
    if len(found) > 1 and found[0].variant is not None:
        raise WeightsError(f"{path} holds fp16 and bf16 weights; choose one with variant='fp16'")
    return found[0]


def is_quantized(folder: Path) -> bool:
    """Whether a model folder holds quantized weights, the canonical file.

    Raises:
        WeightsError: it holds other weights as well.
    """
    file = folder / CANONICAL_FILE
    if not file.is_file():
        return False
    if others := [name for stem in STEMS for name in folder.glob(f"{stem}*.safetensors*")]:
        raise WeightsError(
            f"{folder} holds quantized weights and {others[0].name}; keep them in two folders"
        )
    return True


def _of_variant(folder: Path, variant: str | None) -> WeightFiles | None:
    ending = f".{variant}" if variant else ""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index{ending}.json"
        if index.exists():
            return _sharded(folder, index, variant)
        file = inside(folder, f"{stem}{ending}.safetensors")
        if file.exists():
            return WeightFiles((file,), variant)
    return None


def _sharded(folder: Path, index: Path, variant: str | None) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise WeightsError(f"{index} has no 'weight_map' of key to file name; download it again")
    keys = {
        inside(folder, name): frozenset(k for k, v in weight_map.items() if v == name)
        for name in sorted(set(weight_map.values()))
    }
    return WeightFiles(tuple(keys), variant, keys)


def _tensors(file: Path, skip: Collection[str]) -> dict[str, Tensor]:
    for name, entry in read_header(file).items():
        if name not in ("__metadata__", *skip) and not _is_weight(name, entry):
            raise WeightsError(
                f"{name} in {file} is {entry.get('dtype')}, expected floating-point weights; "
                "quantized checkpoints cannot be loaded here"
            )
    return read_tensors(file, skip)


def _is_weight(name: str, entry: dict[str, Any]) -> bool:
    counts_batches = name.endswith("num_batches_tracked") and entry["dtype"] == "I64"
    return entry["dtype"] in FLOATS or counts_batches


def _compare_with_index(file: Path, keys: Any, found: WeightFiles) -> None:
    if found.keys is None:
        return
    if missing := sorted(found.keys[file] - keys):
        raise WeightsError(f"{file} lacks {_some(missing)}, which the index puts there")
    if unknown := sorted(keys - found.keys[file]):
        raise WeightsError(f"{file} holds {_some(unknown)}, which the index does not put there")


def _nothing_found(folder: Path, variant: str | None) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    hint = f"; convert {pickles[0]} once with gesso models convert" if pickles else ""
    wanted = f"{STEMS[0]}{f'.{variant}' if variant else ''}.safetensors"
    return f"no weights in {folder}: expected {wanted} or an index of shards{hint}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


def trained_dtype(path: Path, variant: str | None = None) -> torch.dtype:
    """The number format that the weights were trained for.

    The first of these that says something: ``trained_dtype`` in the manifest of the folder (or of
    the pipeline whose ``transformer`` it is), ``trained_dtype`` in the file's metadata,
    ``torch_dtype`` or ``dtype`` in ``config.json``, the variant of the file name (also of a twin
    beside a float32 file), the stored format itself (of quantized layers that of λ).
    """
    found = weight_files(path, variant)
    file = found.files[0]
    for stated in (*_stated(file), found.variant, *_twin_variants(file.parent)):
        if stated is not None and str(stated).removeprefix("torch.") in DTYPES:
            return DTYPES[str(stated).removeprefix("torch.")]
    ending = ".smooth" if file.name == CANONICAL_FILE else ""
    entries = {k: v for k, v in read_header(file).items() if k != "__metadata__"}
    stored = {v["dtype"] for k, v in entries.items() if k.endswith(ending)} & DTYPES.keys()
    return DTYPES[stored.pop()] if len(stored) == 1 else torch.float32


def file_metadata(file: Path) -> dict[str, Any]:
    """What a weight file says about its weights; a canonical file says it in ``made_by``."""
    if file.name == CANONICAL_FILE:
        return dict(read_about(file)["made_by"])
    return dict(read_header(file).get("__metadata__", {}))


def _stated(file: Path) -> Iterator[Any]:
    folder = file.parent
    for place in (folder, folder.parent) if folder.name == "transformer" else (folder,):
        if (place / MANIFEST).is_file():
            yield read_json(place / MANIFEST).get("trained_dtype")
    yield file_metadata(file).get("trained_dtype")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        yield config.get("torch_dtype")
        yield config.get("dtype")


def _twin_variants(folder: Path) -> Iterator[str]:
    return (v for v in VARIANTS if v and any(folder.glob(f"{STEMS[0]}*.{v}*")))
