"""Which layers of a model family are quantized, and how; all that a new family needs to add.

A map is a tuple of rules. A rule's pattern names modules, with ``*`` for one part of a dotted name:
``blocks.*.attention.qkv``. What no rule names stays in 16 bit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor, nn

from gesso_core.errors import ConfigError
from gesso_core.layers.linear import PointwiseConv
from gesso_core.quant.layer import K_MULTIPLE
from gesso_core.quant.record import WeightFormat


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """How the layers of one pattern are quantized.

    Attributes:
        pattern: module names, ``*`` stands for one part of the name.
        activation: ``"same"`` quantizes the input like the weights; ``"16bit"`` leaves it, for
            layers that run once per text or on few rows.
        shift: added to the input before its quantizer, to make it non-negative: `GELU_SHIFT` of
            `quant.shift` behind a GELU (INT4 only).
        share: layers of one parent with the same word here read the same input and share λ.
        measure: where the error of a trial is taken: behind the layer, or behind its parent
            (queries, keys and values count by what the attention makes of them).
    """

    pattern: str
    activation: Literal["same", "16bit"] = "same"
    shift: float = 0.0
    share: str | None = None
    measure: Literal["layer", "parent"] = "layer"


LayerMap = Sequence[LayerRule]

_SANA_W4A4: Final = (
    LayerRule(pattern="blocks.*.attention.qkv", measure="parent"),
    LayerRule(pattern="blocks.*.attention.out"),
    LayerRule(pattern="blocks.*.cross.q"),
    LayerRule(pattern="blocks.*.cross.out"),
    LayerRule(pattern="blocks.*.ffn.expand"),
    LayerRule(pattern="blocks.*.ffn.project"),
)

LAYER_MAPS: Final[Mapping[str, LayerMap]] = {
    # Keys and values of the text are made once per prompt: 4-bit weights cost no quality of x.
    "sana": (*_SANA_W4A4, LayerRule(pattern="blocks.*.cross.kv", activation="16bit")),
    # What the engine of the SVDQuant authors reads: it has those layers in 16 bit.
    "sana-nunchaku": _SANA_W4A4,
}


def layer_map(name: str) -> LayerMap:
    """The map of that name; `ConfigError` lists what there is."""
    if name not in LAYER_MAPS:
        raise ConfigError(f"no layer map {name!r}; known are {', '.join(LAYER_MAPS)}")
    return LAYER_MAPS[name]


def find_layers(model: nn.Module, rules: LayerMap) -> dict[str, LayerRule]:
    """The layers of ``model`` that ``rules`` name, in the order of the module tree.

    Raises:
        ConfigError: a rule that names no layer, a layer that two rules name, or one that is
            neither ``nn.Linear`` nor a 1x1 convolution.
    """
    patterns = [(rule, _regular(rule.pattern)) for rule in rules]
    found: dict[str, LayerRule] = {}
    for name, module in model.named_modules():
        hits = [rule for rule, pattern in patterns if pattern.fullmatch(name)]
        if len(hits) > 1:
            raise ConfigError(f"the layer map names {name} twice: {[r.pattern for r in hits]}")
        if hits:
            matrix_of(module, name)
            found[name] = hits[0]
    if unused := [rule.pattern for rule in rules if rule not in found.values()]:
        raise ConfigError(
            f"the layer map does not fit this {type(model).__name__}: nothing is called "
            f"{', '.join(unused)}; use the map of its family ({', '.join(LAYER_MAPS)})"
        )
    return found


def matrix_of(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [N, K] and bias [N] of a linear layer or 1x1 convolution, as views.

    Raises:
        ConfigError: the module is something else; a layer map must not name it.
    """
    if isinstance(module, nn.Linear | PointwiseConv) or _is_pointwise(module):
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return weight.flatten(1), bias
    raise ConfigError(
        f"{name} is a {type(module).__name__}; only nn.Linear and 1x1 convolutions without groups "
        "can be quantized, so leave it out of the layer map"
    )


def planned_bytes(
    model: nn.Module, rules: LayerMap, *, weight: WeightFormat = "int4", rank: int = 32
) -> tuple[int, int]:
    """Bytes of all weights once quantized, and of the same in bfloat16; meta tensors will do."""
    layers = find_layers(model, rules)
    plain = 2 * sum(parameter.numel() for parameter in model.parameters())
    quantized = plain
    for name in layers:
        matrix, bias = matrix_of(model.get_submodule(name), name)
        rows, columns = matrix.shape
        bytes_of_bias = 0 if bias is None else 2 * rows
        quantized -= 2 * rows * columns + bytes_of_bias
        quantized += sum(_parts(rows, columns, weight, rank)) + bytes_of_bias
    return quantized, plain


def _parts(rows: int, columns: int, weight: WeightFormat, rank: int) -> Iterator[int]:
    """Bytes of the tensors of a `QuantizedLinear` as the quantizer makes it, without its bias."""
    padded = -(-columns // K_MULTIPLE) * K_MULTIPLE
    yield rows * padded // (1 if weight == "int8" else 2)
    yield {"int4": 2 * padded // 64, "nvfp4": padded // 16, "int8": 4}[weight] * rows
    yield 2 * padded  # smooth
    yield 2 * rank * (padded + rows)
    yield 2 if weight == "nvfp4" else 0


def _regular(pattern: str) -> re.Pattern[str]:
    return re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size == (1, 1)
