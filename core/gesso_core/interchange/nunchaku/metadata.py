"""Metadata of nunchaku files: what the engine reads, and what gesso adds to replay exactly.

A single file has four entries: ``config`` and ``comfy_config`` (JSON of the transformer's
configuration), ``model_class``, and ``quantization_config`` (JSON). The legacy layout is a folder
with two weight files and two JSON files, and says nothing about precision: that follows from the
dtypes. gesso adds ``gesso_layers``, the sizes that padding hides, which other readers ignore.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.linear import Sizes
from gesso_core.safe_files import inside, read_header, read_json, read_tensors

Precision = Literal["int4", "nvfp4"]

LEGACY_BLOCKS: Final = "transformer_blocks.safetensors"
LEGACY_REST: Final = "unquantized_layers.safetensors"
SIZES_KEY: Final = "gesso_layers"
MADE_BY_KEY: Final = "gesso_made_by"
LITE_METHOD: Final = "nunchaku_lite"

_DTYPE_NAMES: Final[dict[Precision, str]] = {"int4": "int4", "nvfp4": "fp4_e2m1_all"}
_FP8: Final = "fp8_e4m3_nan"


def quantization_config(precision: Precision, rank: int) -> dict[str, Any]:
    """The ``quantization_config`` of a single file; weights and activations share the format."""
    micro = precision == "nvfp4"
    shared = {"dtype": _DTYPE_NAMES[precision]}
    group = {"group_size": 16 if micro else 64}
    return {
        "method": "svdquant",
        "weight": shared | {"scale_dtype": [None, _FP8] if micro else None} | group,
        "activation": shared | {"scale_dtype": _FP8 if micro else None} | group,
        "rank": rank,
    }


def single_file_metadata(
    tensors: Mapping[str, Tensor], *, config: str, comfy_config: str, model_class: str
) -> dict[str, str]:
    """The four entries; precision and rank are read from the tensors (classic or v2 names)."""
    claims = quantization_config(precision_of(tensors), rank_of(tensors))
    if "ZImage" in model_class:
        refined = any("refiner" in name and "attention.to_qkv" in name for name in tensors)
        claims["skip_refiners"] = not refined
    return {
        "config": config,
        "comfy_config": comfy_config,
        "model_class": model_class,
        "quantization_config": json.dumps(claims),
    }


def precision_of(tensors: Mapping[str, Tensor]) -> Precision:
    """nvfp4 if any tensor is 8-bit floating point, else int4."""
    micro = any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    return "nvfp4" if micro else "int4"


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Rank of the first branch, as stored (whole tiles of 16); 32 if there is none."""
    leaves = ("lora_down", "proj_down")
    ranks = (t.shape[1] for name, t in tensors.items() if name.rpartition(".")[2] in leaves)
    return next(ranks, 32)


def require_agreement(
    tensors: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Layers of one file share format and rank, and the metadata says the same.

    Args:
        tensors: layer → classic leaf → tensor.
        metadata: of the file; may lack ``quantization_config``.

    Raises:
        WeightsError: naming two layers that differ, or what the metadata claims.
    """
    formats: dict[Precision, str] = {}
    ranks: dict[int, str] = {}
    for name, leaves in tensors.items():
        if "lora_down" not in leaves or "wscales" not in leaves:
            continue  # weight-only
        formats.setdefault(precision_of({"": leaves["wscales"]}), name)
        rank = leaves["lora_down"].shape[-1:] or (0,)
        ranks.setdefault(rank[0], name)
    for what, found in (("precision", formats), ("rank", ranks)):
        if len(found) > 1:
            told = ", ".join(f"{name} has {value}" for value, name in list(found.items())[:3])
            raise WeightsError(
                f"the layers differ in {what}: {told}; a nunchaku file has one for all: use a file "
                "as published, or quantize every layer alike"
            )
    _compare_claims(metadata, next(iter(formats), None), next(iter(ranks), None))


def _compare_claims(
    metadata: Mapping[str, str], precision: Precision | None, rank: int | None
) -> None:
    if "quantization_config" not in metadata:
        return
    claims = json_entry(metadata, "quantization_config")
    weight = claims.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    if precision is not None and dtype is not None and dtype != _DTYPE_NAMES[precision]:
        raise WeightsError(
            f"the metadata says {dtype} weights, the tensors are {_DTYPE_NAMES[precision]}; the "
            "file mixes two versions: download the one for your card again"
        )
    if rank is not None and isinstance(claims.get("rank"), int) and claims["rank"] != rank:
        raise WeightsError(
            f"the metadata says rank {claims['rank']}, the layers have rank {rank}; "
            "download the file again"
        )


def json_entry(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A metadata entry that holds a JSON object; empty if absent."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the metadata entry {key!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"the metadata entry {key!r} is not a JSON object")
    return value


def sizes_entry(sizes: Mapping[str, Sizes]) -> dict[str, str]:
    """The entry that gesso adds, by layer name in the file."""
    table = {name: asdict(size) for name, size in sorted(sizes.items())}
    return {SIZES_KEY: json.dumps(table, sort_keys=True)}


def read_sizes(metadata: Mapping[str, str]) -> dict[str, Sizes]:
    """Inverse of `sizes_entry`; empty for files that gesso did not write."""
    try:
        sizes = {name: Sizes(**size) for name, size in json_entry(metadata, SIZES_KEY).items()}
    except TypeError as error:
        raise WeightsError(f"the metadata entry {SIZES_KEY!r} is damaged ({error})") from error
    for name, size in sizes.items():
        if not all(type(count) is int and count >= 0 for count in asdict(size).values()):
            raise WeightsError(
                f"the metadata entry {SIZES_KEY!r} is damaged ({name} has {asdict(size)}, expected "
                "counts); download the file again"
            )
    return sizes


def read_legacy(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a legacy folder, and the metadata a single file would have without its class.

    Raises:
        WeightsError: a file is missing or broken, or both weight files hold one name.
    """
    blocks = read_tensors(inside(folder, LEGACY_BLOCKS))
    rest = read_tensors(inside(folder, LEGACY_REST))
    if doubled := sorted(blocks.keys() & rest.keys()):
        raise WeightsError(
            f"{LEGACY_BLOCKS} and {LEGACY_REST} in {folder} both hold {doubled[0]}; they are of "
            "different versions: download both again"
        )
    metadata: dict[str, str] = dict(read_header(folder / LEGACY_BLOCKS).get("__metadata__", {}))
    metadata["config"] = json.dumps(read_json(inside(folder, "config.json")))
    comfy = inside(folder, "comfy_config.json")
    if comfy.exists():
        metadata["comfy_config"] = json.dumps(read_json(comfy))
    return rest | blocks, metadata


def claims_svdquant(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that it is one of the engine's own single files."""
    return json_entry(metadata, "quantization_config").get("method") == "svdquant"


def lite_config(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The ``quantization_config`` of a lite folder, for layers given as classic leaves."""
    first_layer = next(iter(layers.values()))
    dtype = first_layer.get("smooth", first_layer["wscales"]).dtype
    branched = {name: leaves for name, leaves in layers.items() if "lora_down" in leaves}
    weight_only = sorted(layers.keys() - branched.keys())
    config: dict[str, Any] = {
        "quant_method": LITE_METHOD,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }
    if branched:
        first = next(iter(branched.values()))
        precision = precision_of({"": first["wscales"]})
        config["svdq_w4a4"] = {
            "precision": precision,
            "group_size": 16 if precision == "nvfp4" else 64,
            "rank": first["lora_down"].shape[1],
            "targets": sorted(branched),
        }
    if weight_only:
        config["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": weight_only}
    return config
