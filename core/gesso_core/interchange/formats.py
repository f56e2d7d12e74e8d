"""Quantized files of other tools in and out: what a file is, and its conversion.

nunchaku-v1      one file, classic names; SANA becomes our modules, other models keep their names
nunchaku-v2      one file, names of the Python models; read as v1
nunchaku-lite    a diffusers folder whose config.json says nunchaku_lite; read as v1
nunchaku-legacy  a folder with transformer_blocks.safetensors and unquantized_layers.safetensors
deepcompressor   a folder of pickles, read by an explicit import only; import only
modelopt         a folder with NVFP4 weights; import only
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.hub.checkpoint import weight_files
from gesso_core.interchange.deepcompressor import import_deepcompressor, is_intermediate
from gesso_core.interchange.fused_rows import sana_names
from gesso_core.interchange.modelopt import import_modelopt, is_modelopt
from gesso_core.interchange.nunchaku import metadata as meta
from gesso_core.interchange.nunchaku import names
from gesso_core.interchange.nunchaku.files import read_model, write_model
from gesso_core.models.keys.sana import sana_keys
from gesso_core.models.keys.translate import translate
from gesso_core.quant.canonical import (
    CANONICAL_FILE,
    METADATA_KEY,
    QuantizedModel,
    read_canonical,
    write_canonical,
)
from gesso_core.safe_files import inside, read_header, read_json, read_tensors

FileFormat = Literal[
    "canonical",
    "nunchaku-v1",
    "nunchaku-v2",
    "nunchaku-lite",
    "nunchaku-legacy",
    "deepcompressor",
    "modelopt",
]
_SANA_BLOCKS: Final = "transformer_blocks."
_SANA_TABLE: Final = "transformer_blocks.0.scale_shift_table"
EXPORTS: Final = ("canonical", "nunchaku-v1", "nunchaku-v2", "nunchaku-lite", "nunchaku-legacy")


def detect_format(path: Path) -> FileFormat:
    """What a file or folder is, from names and metadata; no weights are read.

    Raises:
        WeightsError: missing, truncated, of mixed versions, or of no known format.
    """
    if path.is_dir():
        return _detect_folder(path)
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    if METADATA_KEY in metadata:
        return "canonical"
    if is_modelopt(header):
        return "modelopt"
    if not any(name.endswith(".qweight") for name in header):
        raise WeightsError(
            f"{path} has no quantized layers of a known format; expected one of: "
            f"{', '.join(get_args(FileFormat))}"
        )
    if not names.uses_new_leaves(header):
        return "nunchaku-v1"
    return "nunchaku-v2" if meta.claims_svdquant(metadata) else "nunchaku-lite"


def import_quantized(path: Path) -> QuantizedModel:
    """Read a quantized model of any format.

    SANA layers get the names of our modules; layers of other models keep the classic names of the
    nunchaku engine, or their own (ModelOpt). ``made_by["config"]`` is the configuration of the
    transformer where the file has it.

    Raises:
        UnsafeFile: a pickle that holds more than tensors.
        WeightsError: truncated, mixed or incomplete files; the message names the tensor.
    """
    kind = detect_format(path)
    if kind == "canonical":
        return read_canonical(path / CANONICAL_FILE if path.is_dir() else path)
    if kind == "deepcompressor":
        return import_deepcompressor(path)
    if kind == "nunchaku-legacy":
        return read_model(*meta.read_legacy(path), kind)
    file = _only_file(path)
    if kind == "modelopt":
        return _from_modelopt(path)
    if kind == "nunchaku-lite":
        return read_model(_all_tensors(path), _lite_metadata(path), kind)
    return read_model(read_tensors(file), read_header(file).get("__metadata__", {}), kind)


def export_quantized(
    model: QuantizedModel,
    path: Path,
    *,
    format: FileFormat = "nunchaku-v1",  # noqa: A002
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model for other tools.

    Args:
        model: layers of SANA under our names, of other models under classic nunchaku names.
        path: the file; for lite and legacy the folder.
        format: one of ``EXPORTS``.
        config: the diffusers configuration of the transformer; by default ``made_by["config"]``.

    Raises:
        WeightsError: the format cannot hold these layers, or is import only.
    """
    if format == "canonical":
        write_canonical(path, model)
        return
    if format not in EXPORTS:
        raise WeightsError(f"cannot write {format!r}; use one of {', '.join(EXPORTS)}")
    write_model(model, path, format, model.made_by.get("config", {}) if config is None else config)


def _detect_folder(path: Path) -> FileFormat:
    if is_intermediate(path):
        return "deepcompressor"
    if (path / meta.LEGACY_BLOCKS).exists():
        return "nunchaku-legacy"
    if (path / CANONICAL_FILE).exists():
        return "canonical"
    if (path / "hf_quant_config.json").exists():
        return "modelopt"
    method = _folder_claims(path).get("quant_method")
    if method == meta.LITE_METHOD:
        return "nunchaku-lite"
    return "modelopt" if method == "modelopt" else detect_format(_only_file(path))


def _folder_claims(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        return {}
    claims = read_json(inside(folder, "config.json")).get("quantization_config", {})
    return claims if isinstance(claims, dict) else {}


def _only_file(path: Path) -> Path:
    """The file itself, or the first weight file of a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else weight_files(path).files[0]


def _all_tensors(path: Path) -> dict[str, Tensor]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        files = list(weight_files(path).files)
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _from_modelopt(path: Path) -> QuantizedModel:
    folder = path if path.is_dir() else path.parent
    quantizer = folder / "hf_quant_config.json"
    claims = read_json(quantizer) if quantizer.exists() else _folder_claims(path)
    model = import_modelopt(_all_tensors(path), claims)
    config = folder / "config.json"
    about = {"config": read_json(config)} if config.exists() else {}
    layers, plain = dict(model.layers), dict(model.plain)
    if all(name.startswith(_SANA_BLOCKS) for name in layers) and _SANA_TABLE in plain:
        layers, plain = sana_names(layers), translate(plain, sana_keys(plain))
    return QuantizedModel(layers=layers, plain=plain, made_by={**model.made_by, **about})


def _lite_metadata(path: Path) -> dict[str, str]:
    """What a single file would carry, from the folder; the file's own entries come along."""
    metadata = dict(read_header(_only_file(path)).get("__metadata__", {}))
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").exists():
        config = read_json(inside(folder, "config.json"))
        config.pop("quantization_config", None)
        metadata["config"] = json.dumps(config)
    return metadata
