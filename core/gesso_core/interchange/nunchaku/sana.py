"""SANA between our modules and the layout that the nunchaku engine reads.

Per block the engine has ``attn.qkv_proj``, ``attn.out_proj``, ``cross_attn.q_linear``,
``cross_attn.out_proj``, ``ff.inverted_conv`` and ``ff.point_conv`` in 4 bit; keys and values of the
text, the depthwise convolution and the modulation table in 16 bit. Widths are padded to whole tiles
of 128, so a width of 2240 is 72 heads of 32 instead of 70. Two layers have their rows in another
order:

    qkv_proj        q of all heads, then per head its k and its v
    inverted_conv   value and gate of one channel adjacent; so are the depthwise channels

The names of the six layers and these orders are those of the published file; norms of queries and
keys, which no published file has, keep their diffusers names here, like all other tensors.
"""

# N output channels   K input channels   R rank   C channels of the depthwise convolution

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.linear import Sizes, resized
from gesso_core.interchange.nunchaku.sana_rows import engine_rows, inverse, pairs, take, take_rows
from gesso_core.models.keys.sana import SANA_DIFFUSERS, SANA_SPRINT_DIFFUSERS
from gesso_core.models.keys.translate import KeyMap, Rule, translate, untranslate
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import QuantizedLinear

ENGINE_LAYERS: Final = {
    "attention.qkv": "attn.qkv_proj",
    "attention.out": "attn.out_proj",
    "cross.q": "cross_attn.q_linear",
    "cross.out": "cross_attn.out_proj",
    "ffn.expand": "ff.inverted_conv",
    "ffn.project": "ff.point_conv",
}
_OUR_LAYERS: Final = {engine: ours for ours, engine in ENGINE_LAYERS.items()}
_GROUP: Final = 64
_MOST: Final = 100_000  # heads, channels
_WB: Final = "{p:weight|bias}"
_PERTURBED: Final = ".attn.pag_to_v."  # serves a guidance that gesso does not offer

_BLOCK_RULES: Final[KeyMap] = (
    Rule("transformer_blocks.{i}.scale_shift_table", "blocks.{i}.table"),
    Rule(f"transformer_blocks.{{i}}.cross_attn.kv_linear.{_WB}", "blocks.{i}.cross.kv.{p}"),
    Rule(f"transformer_blocks.{{i}}.ff.depth_conv.{_WB}", "blocks.{i}.ffn.depthwise.{p}"),
    Rule(
        "transformer_blocks.{i}.attn1.norm_{n:q|k}.weight", "blocks.{i}.attention.{n}_norm.weight"
    ),
    Rule("transformer_blocks.{i}.attn2.norm_{n:q|k}.weight", "blocks.{i}.cross.{n}_norm.weight"),
)


class SanaParts(NamedTuple):
    """Quantized layers and all other tensors, and the diffusers configuration."""

    layers: dict[str, QuantizedLinear]
    plain: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Widths:
    """Channels without padding."""

    width: int
    inner: int  # of the cross-attention
    hidden: int  # of the FFN, before it is doubled
    head: int

    def rows(self, layer: str) -> int:
        """Output channels of one of our layers."""
        return {
            "attention.qkv": 3 * self.width,
            "cross.q": self.inner,
            "ffn.expand": 2 * self.hidden,
        }.get(layer, self.width)

    def columns(self, layer: str) -> int:
        """Input channels of one of our layers."""
        return {"cross.out": self.inner, "ffn.project": self.hidden}.get(layer, self.width)


def is_sana(names: Iterable[str]) -> bool:
    """Whether names of a file (engine) or of layers (ours) belong to a SANA."""
    ours = re.compile(r"blocks\.\d+\.ffn\.expand(\..+)?")
    return any(".ff.inverted_conv." in name or ours.fullmatch(name) for name in names)


def with_dense_text_layers(model: QuantizedModel) -> QuantizedModel:
    """Keys and values of the text in 16 bit, as the engine has them; all else as it is."""
    quantized = dict(model.layers)
    plain = dict(model.plain)
    for name in text_layers(model):
        layer = quantized.pop(name)
        plain[f"{name}.weight"] = layer.dense().to(layer.smooth.dtype)
        if layer.bias is not None:
            plain[f"{name}.bias"] = layer.bias
    return QuantizedModel(layers=quantized, plain=plain, made_by=model.made_by)


def text_layers(model: QuantizedModel) -> list[str]:
    """Quantized layers of our SANA that make keys and values of the text."""
    return [name for name in model.layers if re.fullmatch(r"blocks\.\d+\.cross\.kv", name)]


def to_engine(
    layers: Mapping[str, QuantizedLinear], plain: Mapping[str, Tensor], head_dim: int = 32
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """Our layers and tensors under the engine's names, rows in its order.

    Raises:
        WeightsError: a layer that the engine has in 4 bit is not quantized, or the reverse.
    """
    converted = {}
    for name, layer in layers.items():
        block, ours = _our_layer(name)
        order = engine_rows(ours, layer.out_features, head_dim)
        moved = layer if order is None else take_rows(layer, order)
        converted[f"transformer_{block}.{ENGINE_LAYERS[ours]}"] = moved
    _require_whole_blocks(layers, plain)
    moved_plain = dict(plain)
    for name, tensor in plain.items():
        if ".ffn.depthwise." in name:
            order = pairs(len(tensor) // 2)
            taken = take(tensor, order, 0)
            moved_plain[name] = taken.permute(0, 2, 3, 1) if taken.ndim == 4 else taken
    sprint = any(name.startswith("guidance.") for name in plain)
    return converted, untranslate(moved_plain, _rules(sprint=sprint))


def from_engine(
    layers: Mapping[str, QuantizedLinear],
    plain: Mapping[str, Tensor],
    config: Mapping[str, Any],
    sizes: Mapping[str, Sizes],
) -> SanaParts:
    """Inverse of `to_engine`.

    Args:
        layers: as unpacked, padding included.
        plain: all other tensors of the file.
        config: the diffusers configuration, or empty: then padded widths are taken as they are.
        sizes: of records in files that gesso wrote.

    Raises:
        WeightsError: tensors that are missing, unknown or of the wrong size.
    """
    layers = {name: layer for name, layer in layers.items() if _PERTURBED not in f"{name}."}
    kept = {name: tensor for name, tensor in plain.items() if _PERTURBED not in name}
    sprint = any(name.startswith("time_embed.timestep_embedder.") for name in kept)
    ours = translate(kept, _rules(sprint=sprint))
    for name, tensor in ours.items():
        _require_dimensions(name, tensor)
    widths = _widths(layers, ours, config)
    converted = {}
    for name, layer in layers.items():
        block, _, engine = name.removeprefix("transformer_").partition(".")[2].partition(".")
        ours_name = _OUR_LAYERS.get(engine)
        if ours_name is None:
            raise WeightsError(
                f"{name} is no 4-bit layer of SANA; expected {', '.join(_OUR_LAYERS)} per block"
            )
        converted[f"blocks.{block}.{ours_name}"] = _our_record(
            name, ours_name, layer, widths, sizes.get(name)
        )
    ours = {name: _our_tensor(name, tensor, widths) for name, tensor in ours.items()}
    _require_whole_blocks(converted, ours)
    return SanaParts(converted, ours, _with_hidden(config, widths))


def _rules(*, sprint: bool) -> KeyMap:
    outside = SANA_SPRINT_DIFFUSERS if sprint else SANA_DIFFUSERS
    around = [
        rule for rule in outside if not str(rule.sides()[0][0]).startswith("transformer_blocks.")
    ]
    return (*around, *_BLOCK_RULES)


def _our_layer(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if match is None or match[2] not in ENGINE_LAYERS:
        raise WeightsError(
            f"the nunchaku engine has {name} in 16 bit; leave that layer out of the layer map and "
            "quantize again"
        )
    return match[1], match[2]


def _require_whole_blocks(
    layers: Mapping[str, QuantizedLinear], plain: Mapping[str, Tensor]
) -> None:
    blocks = {
        name.removesuffix(".table") for name in plain if re.fullmatch(r"blocks.*\.table", name)
    }
    blocks |= {".".join(name.split(".")[:2]) for name in layers}
    missing = [
        f"{block}.{layer}"
        for block in sorted(blocks)
        for layer in ENGINE_LAYERS
        if f"{block}.{layer}" not in layers
    ]
    missing += [f"{block}.table" for block in sorted(blocks) if f"{block}.table" not in plain]
    if missing:
        raise WeightsError(
            f"{', '.join(missing[:8])} is missing; the nunchaku layout of SANA has all six layers "
            "of every block in 4 bit: quantize them all, or fetch the whole file"
        )


def _widths(
    layers: Mapping[str, QuantizedLinear], ours: Mapping[str, Tensor], config: Mapping[str, Any]
) -> _Widths:
    table = next((t for name, t in ours.items() if name.endswith(".table")), None)
    depthwise = {n: t for n, t in ours.items() if n.endswith(".ffn.depthwise.weight")}
    query = next((x for name, x in layers.items() if name.endswith(".q_linear")), None)
    if table is None or not depthwise or query is None:
        raise WeightsError(
            "the file has no scale_shift_table, ff.depth_conv or cross_attn.q_linear; expected a "
            "SANA transformer in the nunchaku layout: download it again"
        )
    head = head_dim(config)
    width = int(_number(config, "num_attention_heads")) * head or table.shape[-1]
    stored = len(next(iter(depthwise.values()))) // 2
    hidden = int(_number(config, "mlp_ratio") * width) or stored
    inner = int(_number(config, "num_cross_attention_heads")) * int(
        _number(config, "cross_attention_head_dim")
    )
    hidden = max(hidden, _used_channels(ours, stored)) if hidden < stored else hidden
    return _Widths(width, inner or min(width, query.out_features), hidden, head)


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of one head of the self-attention."""
    return int(_number(config, "attention_head_dim", 32)) or 32


def _number(config: Mapping[str, Any], key: str, default: float = 0) -> float:
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value < _MOST:
        raise WeightsError(
            f"the configuration of the model has {key} {value!r:.40}, expected a number from 0 to "
            f"{_MOST}; use the config.json that came with the file"
        )
    return float(value)


def _used_channels(ours: Mapping[str, Tensor], stored: int) -> int:
    """Hidden channels up to the last that a depthwise convolution does not make zero.

    A model whose hidden width was padded before it was quantized may use the padding, or not.
    """
    used_C = torch.zeros(stored, dtype=torch.bool)
    for name, tensor in ours.items():
        if ".ffn.depthwise." in name and len(tensor) == 2 * stored:
            used_C |= (tensor.view(stored, -1) != 0).any(1)
    return int(used_C.nonzero().max()) + 1 if used_C.any() else 0


def _our_record(
    name: str, ours: str, layer: QuantizedLinear, widths: _Widths, sizes: Sizes | None
) -> QuantizedLinear:
    rows, columns = widths.rows(ours), widths.columns(ours)
    order = engine_rows(ours, rows, widths.head)
    if order is not None and len(order) != layer.out_features:
        raise WeightsError(
            f"{name} has {layer.out_features} rows, expected {len(order)} for {rows} channels; "
            "the file does not fit its configuration: download it again"
        )
    if order is not None:
        layer = take_rows(layer, inverse(order, rows))
    padded = -(-columns // _GROUP) * _GROUP
    return resized(name, layer, sizes or Sizes(rows, columns, padded, layer.rank))


def _our_tensor(name: str, tensor: Tensor, widths: _Widths) -> Tensor:
    if name.startswith("blocks.") and name.endswith(".table"):
        return tensor[:, : widths.width].contiguous()
    if ".ffn.depthwise." not in name:
        return tensor
    order = inverse(pairs(widths.hidden), 2 * widths.hidden)
    if len(tensor) <= int(order.max()):
        raise WeightsError(
            f"{name} has {len(tensor)} channels, expected {len(pairs(widths.hidden))}; "
            "the file does not fit its configuration: download it again"
        )
    taken = tensor[order]
    return taken.permute(0, 3, 1, 2).contiguous() if taken.ndim == 4 else taken


def _require_dimensions(name: str, tensor: Tensor) -> None:
    expected = {"table": 2, "depthwise.weight": 4, "depthwise.bias": 1}
    for ending, dimensions in expected.items():
        if name.endswith(ending) and tensor.ndim != dimensions:
            raise WeightsError(
                f"{name} has the shape {tuple(tensor.shape)}, expected {dimensions} dimensions; "
                "download the file again"
            )


def _with_hidden(config: Mapping[str, Any], widths: _Widths) -> dict[str, Any]:
    """The configuration with a ratio that gives the hidden width of the records."""
    adjusted = dict(config)
    if config and int(_number(config, "mlp_ratio", 2.5) * widths.width) != widths.hidden:
        adjusted["mlp_ratio"] = (widths.hidden + 0.5) / widths.width
    return adjusted
