"""One linear layer: our record to the tensors of the nunchaku engine, and back.

W4A4 layers with a branch have ``qweight wscales [wtscale|wcscales] [bias] smooth smooth_orig
lora_down lora_up``, weight-only layers (AWQ) ``qweight wscales wzeros bias``. Row counts and column
counts are padded to whole tiles of 128; scales, smoothing and bias are filled with 1 there, codes
and factors with 0. Reading drops the padding again where the true `Sizes` are known.

``smooth_orig`` is the smoothing before it was folded into the producer of the input; the engine
never reads it. It equals ``smooth`` unless given.
"""

# N output channels   K input channels   G groups along K   R rank

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from gesso_kernels.number_formats import pack_consecutive, unpack_consecutive
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.packing import (
    TILE,
    pack_awq_scale,
    pack_awq_weight,
    pack_low_rank,
    pack_micro_scale,
    pack_scale,
    pack_vector,
    pack_weight4,
    pad_to,
    unpack_awq_scale,
    unpack_awq_weight,
    unpack_low_rank,
    unpack_micro_scale,
    unpack_scale,
    unpack_vector,
    unpack_weight4,
)
from gesso_core.quant.record import GROUP, ActivationFormat, QuantizedLinear, WeightFormat
from gesso_core.quant.shift import GELU_SHIFT

W4A4_TENSORS = frozenset(
    {
        "qweight", "wscales", "wtscale", "wcscales", "bias",
        "smooth", "smooth_orig", "lora_down", "lora_up",
    }
)  # fmt: skip
AWQ_TENSORS = frozenset({"qweight", "wscales", "wzeros", "bias"})


@dataclass(frozen=True)
class Sizes:
    """What padding hides: the sizes of the record that a packed layer was made from.

    Attributes:
        out_features: N.
        in_features: columns without any padding.
        columns: K of the record, whole groups.
        rank: R.
    """

    out_features: int
    in_features: int
    columns: int
    rank: int

    @classmethod
    def of(cls, layer: QuantizedLinear) -> "Sizes":
        """The sizes of a record."""
        return cls(layer.out_features, layer.in_features, layer.padded_in, layer.rank)


def pack_layer(
    name: str, layer: QuantizedLinear, smooth_orig_K: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of one layer under the leaf names of the classic layout.

    Raises:
        WeightsError: the engine has no such layer: 8 bit, or activations left in 16 bit.
    """
    layer.require_valid(name)
    if layer.zero is not None:
        return _pack_weight_only(name, layer)
    wanted = {"int4": ("int4", "uint4"), "nvfp4": ("nvfp4",)}.get(layer.weight, ())
    if layer.activation not in wanted:
        raise WeightsError(
            f"{name} has {layer.weight} weights with {layer.activation} activations; the nunchaku "
            "engine runs int4 with int4 and nvfp4 with nvfp4: quantize again --to int4 or nvfp4"
        )
    tensors = {"qweight": _packed_codes(layer), **_packed_scales(layer)}
    if layer.bias is not None:
        tensors["bias"] = pack_vector(pad_to(layer.bias.to(layer.smooth.dtype), TILE, 0, 1))
    tensors["smooth"] = pack_vector(pad_to(layer.smooth, TILE, 0, 1))
    original_K = layer.smooth if smooth_orig_K is None else smooth_orig_K
    tensors["smooth_orig"] = pack_vector(pad_to(original_K, TILE, 0, 1))
    tensors["lora_down"] = pack_low_rank(pad_to(layer.down, TILE, 1), "down")
    tensors["lora_up"] = pack_low_rank(pad_to(layer.up, TILE, 0), "up")
    return tensors


def unpack_layer(
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    sizes: Sizes | None = None,
    after_gelu: bool = False,
) -> QuantizedLinear:
    """Inverse of `pack_layer`.

    Args:
        name: for error messages.
        tensors: by leaf name, classic.
        sizes: cut the padding off; None keeps the stored sizes, which engines run unchanged.
        after_gelu: the engine shifts this layer's input and quantizes it without sign (int4).

    Raises:
        WeightsError: missing or unknown tensors, or shapes that do not fit one another.
    """
    leaves = set(tensors)
    weight_only = "wzeros" in leaves
    known = AWQ_TENSORS if weight_only else W4A4_TENSORS
    needed = known - {"bias", "wtscale", "wcscales", "smooth_orig"}
    if leaves - known or needed - leaves:
        raise WeightsError(
            f"{name} lacks {sorted(needed - leaves)} and has {sorted(leaves - known)} too many; "
            f"expected {sorted(needed)}: the file is cut, or mixes layouts; download it again"
        )
    try:
        if weight_only:
            layer = _unpack_weight_only(tensors)
        else:
            layer = _unpack_w4a4(tensors, after_gelu=after_gelu)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in sorted(tensors.items())}
        raise WeightsError(
            f"the tensors of {name} are not in the nunchaku layout ({error}): {shapes}; "
            "download the file again"
        ) from error
    layer.require_valid(name)
    return layer if sizes is None else resized(name, layer, sizes)


def resized(name: str, layer: QuantizedLinear, sizes: Sizes) -> QuantizedLinear:
    """The record without its padding; raises `WeightsError` if it is smaller than ``sizes``."""
    rows, columns, rank = sizes.out_features, sizes.columns, sizes.rank
    if rows > layer.out_features or columns > layer.padded_in or rank > layer.rank:
        raise WeightsError(
            f"{name} is {layer.out_features}x{layer.padded_in} of rank {layer.rank}, smaller than "
            f"the {rows}x{columns} of rank {rank} that the file announces; download it again"
        )
    groups = columns // (GROUP[layer.weight] or columns)
    tensor_scale = layer.tensor_scale
    if tensor_scale is not None and tensor_scale.numel() > 1:
        tensor_scale = tensor_scale[:rows]
    cut = replace(
        layer,
        in_features=sizes.in_features,
        codes=layer.codes[:rows, : columns // 2].contiguous(),
        scale=layer.scale[:rows, :groups].contiguous(),
        smooth=layer.smooth[:columns].contiguous(),
        down=layer.down[:rank, :columns].contiguous(),
        up=layer.up[:rows, :rank].contiguous(),
        bias=None if layer.bias is None else layer.bias[:rows].contiguous(),
        tensor_scale=tensor_scale,
        zero=None if layer.zero is None else layer.zero[:rows, :groups].contiguous(),
    )
    cut.require_valid(name)
    return cut


def with_rank(layer: QuantizedLinear, rank: int) -> QuantizedLinear:
    """The same layer with its branch zero-padded; an engine wants one rank for the whole file."""
    missing = rank - layer.rank
    down_RK = torch.nn.functional.pad(layer.down, (0, 0, 0, missing))
    up_NR = torch.nn.functional.pad(layer.up, (0, missing))
    return replace(layer, down=down_RK, up=up_NR)


def _packed_codes(layer: QuantizedLinear) -> Tensor:
    codes_NK = unpack_consecutive(layer.codes, signed=layer.weight == "int4")
    return pack_weight4(pad_to(pad_to(codes_NK, TILE, 0), TILE, 1))


def _packed_scales(layer: QuantizedLinear) -> dict[str, Tensor]:
    groups = TILE // (GROUP[layer.weight] or TILE)
    scale_NG = pad_to(pad_to(layer.scale, TILE, 0, 1), groups, 1, 1)
    if layer.weight == "int4":
        return {"wscales": pack_scale(scale_NG)}
    tensor_scale = layer.tensor_scale
    if tensor_scale is None:
        tensor_scale = torch.ones(1, dtype=layer.smooth.dtype)
    scales = {"wscales": pack_micro_scale(scale_NG)}
    if tensor_scale.numel() == 1:
        return scales | {"wtscale": tensor_scale}
    return scales | {"wcscales": pack_vector(pad_to(tensor_scale, TILE, 0, 1))}


def _unpack_w4a4(tensors: Mapping[str, Tensor], *, after_gelu: bool) -> QuantizedLinear:
    weight, activation = _formats(tensors["wscales"], after_gelu)
    unpack = unpack_scale if weight == "int4" else unpack_micro_scale
    smooth_K = unpack_vector(tensors["smooth"])
    bias = tensors.get("bias")
    return QuantizedLinear(
        weight=weight,
        activation=activation,
        in_features=len(smooth_K),
        codes=pack_consecutive(unpack_weight4(tensors["qweight"], signed=weight == "int4")),
        scale=unpack(tensors["wscales"]),
        tensor_scale=_tensor_scale(tensors),
        # A published file has zeros in padded channels, where nothing may be divided by them.
        smooth=torch.where(smooth_K == 0, 1, smooth_K),
        down=unpack_low_rank(tensors["lora_down"], "down"),
        up=unpack_low_rank(tensors["lora_up"], "up"),
        bias=None if bias is None else unpack_vector(bias),
        shift=GELU_SHIFT if activation == "uint4" else 0.0,
    )


def _formats(wscales: Tensor, after_gelu: bool) -> tuple[WeightFormat, ActivationFormat]:
    if wscales.dtype == torch.float8_e4m3fn:
        return "nvfp4", "nvfp4"
    return "int4", "uint4" if after_gelu else "int4"


def _tensor_scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    one, rows_N = tensors.get("wtscale"), tensors.get("wcscales")
    if rows_N is None:
        return None if one is None else one.reshape(1)
    rows_N = unpack_vector(rows_N)
    if one is None or (one == 1).all():
        return rows_N
    # Lite files have both; the layer's scale is their product.
    return one.reshape(1) if (rows_N == 1).all() else rows_N.float() * one.float()


def _pack_weight_only(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    if layer.zero is None or layer.rank or layer.out_features % 4:
        raise WeightsError(
            f"{name} is a weight-only layer of {layer.out_features} rows and rank {layer.rank}; "
            "the nunchaku engine has those with a multiple of 4 rows and without a branch"
        )
    tensors = {
        "qweight": pack_awq_weight(unpack_consecutive(layer.codes, signed=False)),
        "wscales": pack_awq_scale(layer.scale),
        "wzeros": pack_awq_scale(layer.zero),
    }
    return tensors if layer.bias is None else tensors | {"bias": layer.bias}


def _unpack_weight_only(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    codes_NK = unpack_awq_weight(tensors["qweight"])
    rows, columns = codes_NK.shape
    groups = columns // (GROUP["int4"] or columns)
    wscales = tensors["wscales"]
    return QuantizedLinear(
        weight="int4",
        activation="16bit",
        in_features=columns,
        codes=pack_consecutive(codes_NK),
        scale=unpack_awq_scale(wscales, groups),
        zero=unpack_awq_scale(tensors["wzeros"], groups),
        smooth=torch.ones(columns, dtype=wscales.dtype),
        down=wscales.new_zeros(0, columns),
        up=wscales.new_zeros(rows, 0),
        bias=tensors.get("bias"),
    )
