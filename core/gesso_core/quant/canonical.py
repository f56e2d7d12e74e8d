"""The canonical file: quantized layers row-major, everything else as it was, and how it was made.

One safetensors file. Layer L has ``L.codes``, ``L.scale``, … (`QuantizedLinear`); tensors that were
not quantized keep their names. The metadata entry ``gesso_quantization`` is JSON: the format
version, what each layer is (formats, in_features, shift), and ``made_by``: the model, its weights
hash, rank, calibration, everything needed to run the quantization again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.quant.record import QuantizedLinear
from gesso_core.safe_files import read_header, read_tensors, write_tensors

CANONICAL_FILE: Final = "gesso_quantized.safetensors"
METADATA_KEY: Final = "gesso_quantization"
VERSION: Final = 1
_TENSORS: Final = ("codes", "scale", "tensor_scale", "zero", "smooth", "down", "up", "bias")
_FACTS: Final = ("weight", "activation", "in_features", "shift")


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedModel:
    """The content of a canonical file.

    Attributes:
        layers: quantized layers by their module name.
        plain: all other tensors by their parameter name.
        made_by: JSON-able account of how it was made; ``model``, ``weights_sha256``, ``rank``, …
    """

    layers: Mapping[str, QuantizedLinear]
    plain: Mapping[str, Tensor]
    made_by: Mapping[str, Any] = field(default_factory=dict)


def write_canonical(path: Path, model: QuantizedModel) -> None:
    """Write the file; the same model gives the same bytes."""
    tensors = dict(model.plain)
    for name, layer in sorted(model.layers.items()):
        layer.require_valid(name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.tensors().items()}
    facts = {
        name: {fact: getattr(layer, fact) for fact in _FACTS}
        for name, layer in sorted(model.layers.items())
    }
    about = {"version": VERSION, "layers": facts, "made_by": dict(model.made_by)}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)})


def read_canonical(path: Path) -> QuantizedModel:
    """Read and check a canonical file.

    Raises:
        WeightsError: truncated, not canonical, of another version, tensors missing, or a layer
            whose facts, types, shapes or numbers are not those of one.
    """
    about = read_about(path)
    tensors = read_tensors(path)
    layers = {}
    for name, facts in about["layers"].items():
        parts: dict[str, Any] = {
            p: tensors.pop(f"{name}.{p}") for p in _TENSORS if f"{name}.{p}" in tensors
        }
        try:
            layers[name] = QuantizedLinear(**facts, **parts)
        except TypeError as error:
            raise WeightsError(
                f"{name} in {path} is incomplete ({error}); the file was cut or mixed, "
                "quantize the model again"
            ) from error
        layers[name].require_valid(f"{path}: {name}")
    return QuantizedModel(layers=layers, plain=tensors, made_by=about["made_by"])


def read_about(path: Path) -> dict[str, Any]:
    """The ``gesso_quantization`` metadata; raises `WeightsError` like `read_canonical`."""
    text = read_header(path).get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise WeightsError(
            f"{path} has no {METADATA_KEY!r} metadata, so it is not a canonical quantized file; "
            "import other formats with: gesso models import-quantized"
        )
    try:
        about = json.loads(text)
        version = about["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(_damaged(path)) from error
    if version != VERSION or type(version) is not int:
        raise WeightsError(
            f"{path} is a quantized file of version {version!r:.20}, this gesso reads "
            f"{VERSION}; quantize the model again or use the gesso that made it"
        )
    mappings = about.get("layers"), about.get("made_by")
    if not all(isinstance(mapping, dict) for mapping in mappings) or not mappings[0]:
        raise WeightsError(_damaged(path))
    return dict(about)


def _damaged(path: Path) -> str:
    return f"{path} has damaged {METADATA_KEY!r} metadata; quantize again"
