"""Nunchaku files: from their tensors to a quantized model, and writers of every variant.

SANA passes through `sana`; layers of other models are read one by one under their own names.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku import metadata as meta
from gesso_core.interchange.nunchaku import names, sana
from gesso_core.interchange.nunchaku.linear import Sizes, pack_layer, unpack_layer, with_rank
from gesso_core.interchange.nunchaku.packing import RANK_TILE, unpack_vector
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import QuantizedLinear
from gesso_core.safe_files import write_tensors

NunchakuFormat = Literal["nunchaku-v1", "nunchaku-v2", "nunchaku-lite", "nunchaku-legacy"]
Packed = dict[str, dict[str, Tensor]]  # layer → leaf → tensor, classic names

LITE_FILE: Final = "diffusion_pytorch_model.safetensors"
_SMOOTH_ORIG: Final = "smooth_orig"


def read_model(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: NunchakuFormat
) -> QuantizedModel:
    """A model from the tensors and the metadata of a file or folder.

    Raises:
        WeightsError: mixed versions, incomplete layers, tensors that contradict the metadata.
    """
    if names.uses_new_leaves(tensors):
        modules = kind == "nunchaku-v2"
        tensors = {names.to_classic(n, modules=modules): t for n, t in tensors.items()}
    packed, plain = names.split_layers(tensors)
    if not packed:
        raise WeightsError("the file has no quantized layers (no tensor ends with .qweight)")
    meta.require_agreement(packed, metadata)
    sizes, config = meta.read_sizes(metadata), meta.json_entry(metadata, "config")
    if sana.is_sana(tensors):
        unpacked = {name: unpack_layer(name, leaves) for name, leaves in packed.items()}
        layers, plain, config = sana.from_engine(unpacked, plain, config, sizes)
    else:
        layers = {}
        for name, leaves in packed.items():
            after_gelu = kind != "nunchaku-lite" and names.is_after_gelu(name)
            size = sizes.get(name)
            layers[name] = unpack_layer(name, leaves, sizes=size, after_gelu=after_gelu)
            plain |= _smooth_orig(name, leaves, layers[name])
    return QuantizedModel(
        layers=layers, plain=plain, made_by=_made_by(metadata, kind, layers, config)
    )


def write_model(
    model: QuantizedModel, path: Path, kind: NunchakuFormat, config: Mapping[str, Any]
) -> None:
    """Write a file, or a folder for lite and legacy; raises like `interchange.export_quantized`."""
    layers, plain, sizes = _packed_model(model, config)
    own = meta.sizes_entry(sizes) | {meta.MADE_BY_KEY: json.dumps(dict(model.made_by))}
    _WRITERS[kind](path, layers, plain, dict(config), own)


def _made_by(
    metadata: Mapping[str, str],
    kind: NunchakuFormat,
    layers: Mapping[str, QuantizedLinear],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    about = meta.json_entry(metadata, meta.MADE_BY_KEY)
    if not about:
        about = {"imported_from": kind, "rank": max(x.rank for x in layers.values())}
        about |= {"model_class": metadata["model_class"]} if "model_class" in metadata else {}
    return about | ({"config": dict(config)} if config else {})


def _smooth_orig(
    name: str, leaves: Mapping[str, Tensor], layer: QuantizedLinear
) -> dict[str, Tensor]:
    """λ that was folded into the producer, kept only where it differs from what divides."""
    if _SMOOTH_ORIG not in leaves:
        return {}
    original_K = unpack_vector(leaves[_SMOOTH_ORIG])[: layer.padded_in]
    original_K = torch.where(original_K == 0, 1, original_K)
    same = torch.equal(original_K, layer.smooth)
    return {} if same else {f"{name}.{_SMOOTH_ORIG}": original_K}


def _packed_model(
    model: QuantizedModel, config: Mapping[str, Any]
) -> tuple[Packed, dict[str, Tensor], dict[str, Sizes]]:
    """Packed layers, other tensors, and the sizes of the records, by the engine's names."""
    model = sana.with_dense_text_layers(model)
    layers, plain = dict(model.layers), dict(model.plain)
    sizes = {name: Sizes.of(layer) for name, layer in layers.items()}
    if sana.is_sana(layers):
        layers, plain = sana.to_engine(layers, plain, sana.head_dim(config))
        sizes = dict(zip(layers, sizes.values(), strict=True))
    branched = [layer.rank for layer in layers.values() if layer.zero is None]
    rank = -(-max(branched, default=0) // RANK_TILE) * RANK_TILE
    packed = {}
    for name, layer in layers.items():
        padded = layer if layer.zero is not None else with_rank(layer, rank)
        packed[name] = pack_layer(name, padded, plain.pop(f"{name}.{_SMOOTH_ORIG}", None))
    meta.require_agreement(packed, {})
    return packed, plain, sizes


def _write_single(
    path: Path,
    layers: Packed,
    plain: dict[str, Tensor],
    config: dict[str, Any],
    own: dict[str, str],
    rename: Callable[[str], str] = str,
) -> None:
    tensors = {rename(name): tensor for name, tensor in (_flat(layers) | plain).items()}
    _save(tensors, path, _claims(tensors, config, layers) | own)


def _write_legacy(
    path: Path,
    layers: Packed,
    plain: dict[str, Tensor],
    config: dict[str, Any],
    own: dict[str, str],
) -> None:
    inner = {name for name in plain if "transformer_blocks." in name}
    blocks = _flat(layers) | {name: plain[name] for name in inner}
    _save(blocks, path / meta.LEGACY_BLOCKS, own)
    rest = {name: tensor for name, tensor in plain.items() if name not in inner}
    _save(rest, path / meta.LEGACY_REST, {})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "comfy_config.json").write_text("{}")


def _write_lite(
    path: Path,
    layers: Packed,
    plain: dict[str, Tensor],
    config: dict[str, Any],
    own: dict[str, str],
) -> None:
    for name in layers:
        if names.is_flux_layer(name) or sana.is_sana([f"{name}."]):
            raise WeightsError(
                f"nunchaku-lite replaces single linear layers of a diffusers model, which has no "
                f"{name.rpartition('.')[2]}; export this model as nunchaku-v1"
            )
    lite = {name: _lite_leaves(leaves) for name, leaves in layers.items()}
    tensors = {names.to_lite(name): tensor for name, tensor in (_flat(lite) | plain).items()}
    _save(tensors, path / LITE_FILE, own)
    quantization = meta.lite_config(layers)
    full = config | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(full, indent=2))


def _lite_leaves(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a lite layer declares: its loader wants exactly these."""
    if "wzeros" in leaves:
        groups = leaves["qweight"].shape[1] * 2 // 64
        return dict(leaves) | {leaf: leaves[leaf][:groups] for leaf in ("wscales", "wzeros")}
    lite = {leaf: tensor for leaf, tensor in leaves.items() if leaf != _SMOOTH_ORIG}
    if meta.precision_of(leaves) == "nvfp4":
        dtype = leaves["smooth"].dtype
        lite.setdefault("wtscale", torch.ones(1, dtype=dtype))
        lite.setdefault("wcscales", torch.ones(leaves["qweight"].shape[0], dtype=dtype))
    return lite


_Writer = Callable[[Path, Packed, dict[str, Tensor], dict[str, Any], dict[str, str]], None]
_WRITERS: Final[Mapping[NunchakuFormat, _Writer]] = {
    "nunchaku-v1": _write_single,
    "nunchaku-v2": partial(_write_single, rename=names.to_v2),
    "nunchaku-legacy": _write_legacy,
    "nunchaku-lite": _write_lite,
}


def _claims(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: Packed
) -> dict[str, str]:
    family = "Sana" if sana.is_sana(_flat(layers)) else "Flux"
    classes = {"Sana": "NunchakuSanaTransformer2DModel", "Flux": "NunchakuFluxTransformer2dModel"}
    return meta.single_file_metadata(
        tensors,
        config=json.dumps(dict(config)),
        comfy_config=json.dumps({"model_class": family}),
        model_class=classes[family],
    )


def _flat(layers: Packed) -> dict[str, Tensor]:
    return {f"{name}.{leaf}": x for name, leaves in layers.items() for leaf, x in leaves.items()}


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # Shared memory is not allowed in a file: smooth and smooth_orig may be one tensor.
    write_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, metadata)
