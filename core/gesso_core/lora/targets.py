"""Where the layers of a LoRA file belong in a model of ours.

Files name layers as the published models do; some of ours are several of theirs in one (queries,
keys and values). The tables of `gesso_core.models.keys` say which, read backwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gesso_core.errors import WeightsError
from gesso_core.layers.linear import Linear, PointwiseConv
from gesso_core.lora.adapter import FLAT_PREFIXES, Adapter, Pair
from gesso_core.models.keys.translate import KeyMap, untranslate


@dataclass(frozen=True, eq=False)
class Target:
    """Rows ``row`` to ``row + rows`` of a layer with ``columns`` inputs and ``outputs`` outputs."""

    name: str
    module: nn.Module
    row: int
    rows: int
    columns: int
    outputs: int


Placed = tuple[Target, Pair]


class LayerMap:
    """The layers of one model that take a LoRA, by the names that files use."""

    def __init__(self, model: nn.Module, tables: Sequence[KeyMap]) -> None:
        self.targets = {
            theirs: target for table in tables for theirs, target in _targets(model, table)
        }
        self._flat = {name.replace(".", "_"): name for name in self.targets}
        assert len(self._flat) == len(self.targets)

    def place(self, adapter: Adapter, file: str) -> list[Placed]:
        """Every pair with its target; `WeightsError` for a layer that the model does not have."""
        return [self._placed(layer, pair, file) for layer, pair in adapter.pairs.items()]

    def _placed(self, layer: str, pair: Pair, file: str) -> Placed:
        target = self.targets.get(self._name(layer))
        if target is None:
            raise WeightsError(
                f"{file}: {pair.key!r} is for the layer {layer!r}, to which this model adds no "
                f"LoRA; it was made for another model, or names it unlike {self._example()}"
            )
        given, expected = (len(pair.up), pair.down.shape[1]), (target.rows, target.columns)
        if given != expected:
            raise WeightsError(
                f"{file}: {pair.key!r} is for a layer of {given[1]} inputs and {given[0]} outputs, "
                f"but {target.name} has {expected[1]} and {expected[0]}; "
                "it was made for a model of another size"
            )
        return target, pair

    def _name(self, layer: str) -> str:
        for prefix in FLAT_PREFIXES:
            if layer.startswith(prefix):
                return self._flat.get(layer.removeprefix(prefix), layer)
        return layer

    def _example(self) -> str:
        return next(iter(self.targets), "any layer of it")


def _targets(model: nn.Module, table: KeyMap) -> Iterator[tuple[str, Target]]:
    for ours, module in model.named_modules():
        features = _features(module)
        if features is None:
            continue
        outputs, columns = features
        stand_in = torch.empty(outputs, columns, device="meta")
        parts = untranslate({f"{ours}.weight": stand_in}, table)
        row = 0
        for theirs, part in parts.items():
            rows = len(part)
            name = theirs.removesuffix(".weight")
            yield name, Target(ours, module, row, rows, columns, outputs)
            row += rows


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer that adds active low-rank factors; None for any other."""
    if isinstance(module, Linear | PointwiseConv):
        return module.weight.shape[0], module.weight.shape[1]
    outputs, inputs = (getattr(module, name, None) for name in ("out_features", "in_features"))
    if isinstance(module, nn.Linear) or not (isinstance(outputs, int) and isinstance(inputs, int)):
        return None
    return outputs, inputs
