"""FLUX blocks as the deepcompressor quantizer leaves them → layers under the engine's names.

q, k and v become one layer with one branch; the projection out of a single block, which the
quantizer has split by input columns, becomes ``out_proj`` (attention) and ``mlp_fc2``, the latter
with the bias. AdaLN layers are weight-only, their rows interleaved. Tensors that were not quantized
keep their diffusers names, except the norms of queries and keys inside a block.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.intermediate import (
    require_grid,
    residual_layer,
    weight_only_layer,
)
from gesso_core.quant.record import QuantizedLinear

BLOCK: Final = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")


class IntermediateState(NamedTuple):
    """The four files of the quantizer.

    Attributes:
        model: dequantized weights and everything else, by parameter name.
        scale: ``<m>.weight.scale.0`` and, for nvfp4, ``.1``.
        smooth: λ by the module that is read first.
        branch: ``<m>.a.weight`` [R, K] and ``<m>.b.weight`` [N, R].
        out_fused: λ of the attention's output projection was folded into the values.
    """

    model: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    smooth: Mapping[str, Tensor]
    branch: Mapping[str, Tensor]
    out_fused: bool


class Converted(NamedTuple):
    """Quantized layers, and all other tensors, both under names of the engine."""

    layers: dict[str, QuantizedLinear]
    plain: dict[str, Tensor]


@dataclass(frozen=True)
class _Source:
    """Where a W4A4 layer of a block comes from."""

    modules: tuple[str, ...]  # stacked along the rows
    smooth: str
    branch: str = ""  # the first module unless given
    may_fuse: bool = False


_SINGLE: Final = {
    "qkv_proj": _Source(("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_q"),
    "mlp_fc1": _Source(("proj_mlp",), "attn.to_q"),
    "out_proj": _Source(("proj_out.linears.0",), "proj_out.linears.0", may_fuse=True),
    "mlp_fc2": _Source(("proj_out.linears.1.linear",), "proj_out.linears.1.linear"),
}
_DOUBLE: Final = {
    "qkv_proj": _Source(("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_q"),
    "qkv_proj_context": _Source(
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.add_k_proj",
        branch="attn.add_k_proj",
    ),
    "out_proj": _Source(("attn.to_out.0",), "attn.to_out.0", may_fuse=True),
    "out_proj_context": _Source(("attn.to_add_out",), "attn.to_out.0", may_fuse=True),
    "mlp_fc1": _Source(("ff.net.0.proj",), "ff.net.0.proj"),
    "mlp_fc2": _Source(("ff.net.2.linear",), "ff.net.2.linear"),
    "mlp_context_fc1": _Source(("ff_context.net.0.proj",), "ff_context.net.0.proj"),
    "mlp_context_fc2": _Source(("ff_context.net.2.linear",), "ff_context.net.2.linear"),
}  # fmt: skip
# AdaLN layers, and how many vectors each makes.
_ADALN: Final = {"norm.linear": 3, "norm1.linear": 6, "norm1_context.linear": 6}
_NORMS: Final = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def flux_layers(state: IntermediateState) -> Converted:
    """Every block of a FLUX transformer, and what surrounds them.

    Raises:
        WeightsError: naming the tensor that is missing, or that no table knows.
    """
    converted = Converted({}, {})
    left = dict(state.model)
    blocks = {match[1] for name in state.model if (match := BLOCK.fullmatch(name))}
    for block in sorted(blocks, key=lambda name: (name.split(".")[0], int(name.split(".")[1]))):
        _convert_block(block, state, left, converted)
    strays = sorted(name for name in left if BLOCK.fullmatch(name))
    if strays:
        raise WeightsError(
            f"no layer of a FLUX block has the tensors {', '.join(strays[:8])}; "
            "expected the model.pt of a FLUX transformer"
        )
    converted.plain.update(left)
    return converted


def _convert_block(
    block: str, state: IntermediateState, left: dict[str, Tensor], converted: Converted
) -> None:
    for target, source in (_SINGLE if block.startswith("single") else _DOUBLE).items():
        name = f"{block}.{target}"
        fused = source.may_fuse and state.out_fused
        converted.layers[name] = _made(
            name, partial(_linear, block, source, state, left, fused=fused)
        )
        if fused and f"{block}.{source.smooth}" in state.smooth:
            converted.plain[f"{name}.smooth_orig"] = state.smooth[f"{block}.{source.smooth}"]
    for target, splits in _ADALN.items():
        name = f"{block}.{target}"
        if f"{name}.weight.scale.0" in state.scale:
            weight, scale = _take(left, f"{name}.weight"), state.scale[f"{name}.weight.scale.0"]
            bias = left.pop(f"{name}.bias", None)
            make = partial(weight_only_layer, weight, scale, bias, splits)
            converted.layers[name] = _made(name, make)
    for norm in _NORMS:
        if f"{block}.attn.{norm}.weight" in left:
            converted.plain[f"{block}.{norm}.weight"] = left.pop(f"{block}.attn.{norm}.weight")


def _made(name: str, make: Callable[[], QuantizedLinear]) -> QuantizedLinear:
    """A layer that is valid; what went wrong in ``make`` names it."""
    try:
        layer = make()
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(
            f"the tensors of {name} do not fit one another ({str(error)[:200]}); use the whole "
            "folder of one run of deepcompressor"
        ) from error
    layer.require_valid(name)
    return layer


def _linear(
    block: str,
    source: _Source,
    state: IntermediateState,
    left: dict[str, Tensor],
    *,
    fused: bool,
) -> QuantizedLinear:
    modules = [f"{block}.{module}" for module in source.modules]
    weights = [_take(left, f"{module}.weight") for module in modules]
    biases = [left.pop(f"{module}.bias", None) for module in modules]
    scale, micro_NG = _scales(modules, weights, state.scale)
    branch = f"{block}.{source.branch or source.modules[0]}"
    down, up = (state.branch.get(f"{branch}.{factor}.weight") for factor in "ab")
    weight_NK = torch.cat(weights)
    layer = residual_layer(
        weight_NK,
        scale,
        micro_scale_NG=micro_NG,
        bias_N=_stacked_bias(weights, biases),
        smooth_K=None if fused else state.smooth.get(f"{block}.{source.smooth}"),
        down_RK=down,
        up_NR=up,
        shift=_shift(modules[0], left),
    )
    require_grid(modules[0], weight_NK, layer)
    return layer


def _shift(module: str, left: dict[str, Tensor]) -> float | None:
    """The shift of a wrapped layer ``<m>.linear`` is a tensor ``<m>.shift``."""
    shift = left.pop(f"{module.removesuffix('.linear')}.shift", None)
    if shift is None:
        return None
    if shift.numel() == 0 or (shift != shift.flatten()[0]).any():
        raise WeightsError(f"{module}.shift holds {shift.numel()} different values, expected one")
    return float(shift.flatten()[0])


def _scales(
    modules: list[str], weights: list[Tensor], scale: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scales of int4, or tensor scales and micro scales of nvfp4, of the stacked rows."""
    first = [_take_from(scale, f"{module}.weight.scale.0") for module in modules]
    second = [scale.get(f"{module}.weight.scale.1") for module in modules]
    found = [x.reshape(len(w), -1) for x, w in zip(second, weights, strict=True) if x is not None]
    if not found:
        return torch.cat([x.reshape(len(w), -1) for x, w in zip(first, weights, strict=True)]), None
    if len(found) < len(modules):
        raise WeightsError(
            f"{', '.join(modules)} have scales of one and of two levels; "
            "quantize them to one format"
        )
    if len(modules) == 1:
        return first[0].flatten(), found[0]
    rows = [x.flatten().expand(len(w)) for x, w in zip(first, weights, strict=True)]
    return torch.cat(rows), torch.cat(found)


def _stacked_bias(weights: list[Tensor], biases: list[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    tensor = _take_from(left, name)
    del left[name]
    return tensor


def _take_from(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(
            f"{name} is missing; expected the files that deepcompressor saved for one FLUX "
            "transformer, all from the same run"
        )
    return tensors[name]
