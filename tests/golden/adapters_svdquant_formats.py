"""Adapters of the cases that fix foreign quantized file formats, all of them bit for bit."""

import json
from collections.abc import Callable

import torch
from gesso_core.interchange.nunchaku import packing
from gesso_core.interchange.nunchaku.flux import IntermediateState, flux_layers
from gesso_core.interchange.nunchaku.intermediate import (
    int8_codes,
    residual_layer,
    weight_only_layer,
)
from gesso_core.interchange.nunchaku.linear import pack_layer, unpack_layer
from gesso_core.interchange.nunchaku.lora import concatenate_block
from gesso_core.interchange.nunchaku.metadata import quantization_config, single_file_metadata
from gesso_core.interchange.nunchaku.names import key_map, to_classic
from gesso_core.interchange.nunchaku.packing import TILE, TILE_8BIT, pad_to
from golden_case import Adapter, Case
from torch import Tensor


def require(condition: object, message: str) -> None:
    """An ``assert`` that survives any way of running Python."""
    if not condition:
        raise AssertionError(message)


def require_equal_bits(name: str, got: Tensor, want: Tensor) -> None:
    require(got.dtype == want.dtype, f"output.{name} is {got.dtype}, expected {want.dtype}")
    require(got.shape == want.shape, f"output.{name} is {got.shape}, expected {want.shape}")
    same = got.contiguous().view(torch.uint8) == want.contiguous().view(torch.uint8)
    require(same.all(), f"output.{name}: {int((~same).sum())} of {same.numel()} bytes differ")


def compare_bits(name: str, got: Tensor, want: Tensor, case: Case) -> None:
    """Every byte counts, whatever tolerance the header of the case carries."""
    require(case.meta["tolerance"]["mode"] == "bit-exact", "this comparison is for exact cases")
    require_equal_bits(name, got, want)


def as_stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """e4m3 tensors are kept as bytes in the cases."""
    fp8 = torch.float8_e4m3fn
    return {n: t.view(torch.uint8) if t.dtype == fp8 else t for n, t in tensors.items()}


def packed(name: str, layer, smooth_orig: Tensor | None = None) -> dict[str, Tensor]:
    """The layer packed; what was packed must unpack to the same tensors."""
    tensors = pack_layer(name, layer, smooth_orig)
    again = pack_layer(name, unpack_layer(name, tensors), smooth_orig)
    require(again.keys() == tensors.keys(), f"{name} changes its tensors on the way back")
    for leaf, tensor in tensors.items():
        padded = pad_to(smooth_orig, TILE, 0, 1) if smooth_orig is not None else None
        if leaf == "smooth_orig" and padded is not None:
            require_equal_bits(leaf, packing.pack_vector(padded), tensor)
        else:
            require_equal_bits(leaf, again[leaf], tensor)
    return tensors


def four_bit_weight(case: Case) -> dict[str, Tensor]:
    """The weight alone, without a branch; the factors, where given, are packed as they are."""
    given = case.inputs
    layer = residual_layer(
        given["weight"],
        given["scale"],
        micro_scale_NG=given.get("subscale"),
        bias_N=given.get("bias"),
        smooth_K=given.get("smooth"),
    )
    tensors = as_stored(packed(case.meta["case"], layer))
    if "codes" in given:
        rows, columns = given["codes"].shape
        codes = packing.unpack_weight4(tensors["qweight"], signed=True)
        require(torch.equal(codes[:rows, :columns], given["codes"]), "the codes differ")
    for side, dim in (("down", 1), ("up", 0)):
        if f"lora_{side}" in given:
            padded = pad_to(given[f"lora_{side}"], TILE, dim)
            tensors[f"lora_{side}"] = packing.pack_low_rank(padded, side)
    return {name: tensors[name] for name in case.outputs}


def low_rank(case: Case) -> dict[str, Tensor]:
    produced = {}
    for name, factor in case.inputs.items():
        side = name.rpartition(".")[2]
        produced[name] = packing.pack_low_rank(factor, side)
        back = packing.unpack_low_rank(produced[name], side)
        rows, columns = factor.shape
        require(torch.equal(back[:rows, :columns], factor), f"{name} does not unpack")
        require(back.count_nonzero() == factor.count_nonzero(), f"{name}: padding is not zero")
    return produced


def eight_bit_weight(case: Case) -> dict[str, Tensor]:
    given = case.inputs
    codes = int8_codes(given["weight"], given["scale"])
    codes = pad_to(pad_to(codes, TILE, 0), TILE_8BIT, 1)
    qweight = packing.pack_weight8(codes)
    require(torch.equal(packing.unpack_weight8(qweight), codes), "8-bit codes do not unpack")
    scale_N = given["scale"].flatten()
    vectors = {"wscales": scale_N, "bias": given.get("bias", torch.zeros_like(scale_N))}
    packed_vectors = {n: packing.pack_vector(pad_to(v, TILE, 0, 1)) for n, v in vectors.items()}
    return {name: ({"qweight": qweight} | packed_vectors)[name] for name in case.outputs}


def weight_only(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.meta["config"]
    require(config.get("zero", 7) == 7, "the layout has the value 0 at code 7")
    layer = weight_only_layer(
        given["weight"], given["scale"], given.get("bias"), config["adanorm_splits"]
    )
    return packed(case.meta["case"], layer)


def linear(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.meta["config"]
    smooth, fused = given.get("smooth"), config["smooth_fused"]
    layer = residual_layer(
        given["weight"],
        given["scale"],
        micro_scale_NG=given.get("subscale"),
        bias_N=given.get("bias"),
        smooth_K=None if fused else smooth,
        down_RK=given.get("lora_down"),
        up_NR=given.get("lora_up"),
        shift=config["shift"],
    )
    return as_stored(packed(case.meta["case"], layer, smooth if fused else None))


def flux_block(case: Case) -> dict[str, Tensor]:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "scale": {}, "smooth": {}, "branch": {}}
    for name, tensor in case.inputs.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    fused = case.meta["config"]["fuse_when_possible"]
    layers, plain = flux_layers(IntermediateState(**parts, out_fused=fused))
    produced = {}
    for name, layer in layers.items():
        tensors = as_stored(packed(name, layer, plain.pop(f"{name}.smooth_orig", None)))
        produced |= {f"blocks.{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
    for name, tensor in plain.items():
        place = "blocks" if "transformer_blocks." in name else "other"
        produced[f"{place}.{name}"] = tensor
    return produced


def lora(case: Case) -> dict[str, Tensor]:
    base, adapters = ({}, {})
    for name, tensor in case.inputs.items():
        part, _, rest = name.partition(".")
        (base if part == "base" else adapters)[rest] = tensor
    (block,) = {".".join(name.split(".")[:2]) for name in (*base, *adapters)}
    return concatenate_block(block, base, adapters)


def metadata(case: Case) -> dict[str, Tensor]:
    """The outputs are the tensors of the file; what is made here is the metadata beside them."""
    config = case.meta["config"]
    wanted = config["metadata"]
    tensors = {
        name: tensor.view(torch.float8_e4m3fn) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in case.outputs.items()
    }
    made = single_file_metadata(
        tensors,
        config=wanted["config"],
        comfy_config=wanted["comfy_config"],
        model_class=wanted["model_class"],
    )
    require(made == wanted, f"the metadata is {made}, expected {wanted}")
    claimed = quantization_config("nvfp4" if config["fp4"] else "int4", config["rank"])
    require(json.loads(wanted["quantization_config"]) == claimed, f"the claims are {claimed}")
    return dict(case.outputs)


def names(case: Case) -> dict[str, Tensor]:
    wanted = case.meta["map"]
    require(
        key_map(wanted) == wanted, f"the map differs: {key_map(wanted).items() ^ wanted.items()}"
    )
    back = {new: to_classic(new) for new in wanted.values()}
    require(back == {new: old for old, new in wanted.items()}, "the map does not invert")
    return {}


def rotary(case: Case) -> dict[str, Tensor]:
    table = case.inputs["rotemb"]
    table_BMD = table.reshape(*table.shape[:2], -1)
    stored = packing.pack_rotary(table_BMD)
    require(torch.equal(packing.unpack_rotary(stored), table_BMD), "the table does not unpack")
    return {"packed": stored}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("svdquant", "nunchaku_pack_int4"): four_bit_weight,
    ("svdquant", "nunchaku_pack_nvfp4"): four_bit_weight,
    ("svdquant", "nunchaku_pack_lowrank"): low_rank,
    ("svdquant", "nunchaku_pack_w8a8"): eight_bit_weight,
    ("svdquant", "nunchaku_awq"): weight_only,
    ("svdquant", "nunchaku_linear"): linear,
    ("svdquant", "nunchaku_flux_double_block"): flux_block,
    ("svdquant", "nunchaku_flux_single_block"): flux_block,
    ("svdquant", "nunchaku_lora_concat"): lora,
    ("svdquant", "nunchaku_metadata"): metadata,
    ("svdquant", "nunchaku_pack_rotemb"): rotary,
    ("svdquant", "nunchaku_key_map"): names,
}

Compare = Callable[[str, Tensor, Tensor, Case], None]
COMPARE: dict[tuple[str, str], Compare] = dict.fromkeys(ADAPTERS, compare_bits)
