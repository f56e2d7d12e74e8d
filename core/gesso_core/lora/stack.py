"""Several adapters at their strengths, as the factors of every layer of one model.

The ranks of all adapters lie one after the other: ``down`` (R, K) stacks their rows, ``up`` (N, R)
their columns with ``strength · alpha / rank`` multiplied in. Where one of our layers is several of
the file's (queries, keys and values), ``up`` is block diagonal, and rows that read the input alike
are kept once. The rank is padded with zeros to a multiple of 16, which the kernels want.

Source: SVDQuant (arXiv 2411.05007): a LoRA beside a quantized layer is more rank of its low-rank
branch.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.layers.adapters import LowRank
from gesso_core.lora.adapter import MAX_RANK, Adapter
from gesso_core.lora.targets import LayerMap, Placed, Target

RANK_MULTIPLE = 16

StackKey = tuple[tuple[str, float], ...]
"""What decides about the numbers: (sha256, strength) of every adapter that counts, in order."""


@dataclass(frozen=True, kw_only=True)
class AppliedLora:
    """An adapter in use: the name it was asked by, which bytes that was, and how strong."""

    name: str
    sha256: str
    strength: float


class LoraStack:
    """Adapters made ready for a model. Immutable; stacks of equal ``key`` give equal numbers."""

    def __init__(self, uses: Sequence[AppliedLora], factors: Mapping[nn.Module, LowRank]) -> None:
        self.uses = tuple(uses)
        self.key = stack_key(uses)
        self._factors = dict(factors)

    def low_rank(self, module: nn.Module) -> LowRank | None:
        """(down, up) of a layer, by the identity of its module."""
        return self._factors.get(module)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(down.nbytes + up.nbytes for down, up in self._factors.values())


def stack_key(uses: Iterable[AppliedLora]) -> StackKey:
    """The key of a stack; an adapter of strength 0 does nothing, so it does not count."""
    return tuple((use.sha256, use.strength) for use in uses if use.strength != 0)


@torch.no_grad()
def make_stack(
    wanted: Sequence[tuple[AppliedLora, Adapter]],
    layers: LayerMap,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LoraStack:
    """The factors of every layer, in ``dtype`` on ``device``.

    Raises:
        WeightsError: an adapter does not fit the model, together they have too high a rank, or a
            number does not fit the dtype.
    """
    blocks: dict[nn.Module, list[LowRank]] = defaultdict(list)
    names: dict[nn.Module, str] = {}
    for use, adapter in wanted:
        places = layers.place(adapter, use.name)  # also at strength 0: a wrong file stays wrong
        if use.strength == 0:
            continue
        for target, placed in _by_module(places).items():
            blocks[target.module].append(_factors(placed, use.strength))
            names[target.module] = target.name
    factors = {
        module: _concatenated(parts, names[module], dtype, torch.device(device))
        for module, parts in blocks.items()
    }
    return LoraStack([use for use, _ in wanted], factors)


def _by_module(places: Sequence[Placed]) -> dict[Target, list[Placed]]:
    """Pairs of one module together, under one of its targets."""
    first: dict[nn.Module, Target] = {}
    grouped: dict[Target, list[Placed]] = defaultdict(list)
    for target, pair in places:
        grouped[first.setdefault(target.module, target)].append((target, pair))
    return grouped


def _factors(placed: Sequence[Placed], strength: float) -> LowRank:
    """One adapter's (down, up) of one module in fp32, block diagonal where it has several pairs."""
    downs: list[Tensor] = []
    blocks: list[tuple[Target, Tensor, int]] = []
    for target, pair in placed:
        down_RK = pair.down.float()
        place = next((i for i, known in enumerate(downs) if torch.equal(known, down_RK)), None)
        if place is None:
            downs.append(down_RK)
            place = len(downs) - 1
        blocks.append((target, pair.up.float() * (pair.scale * strength), place))
    starts = [0]
    for down_RK in downs:
        starts.append(starts[-1] + len(down_RK))
    up_NR = torch.zeros(placed[0][0].outputs, starts[-1])
    for target, block, place in blocks:
        columns = slice(starts[place], starts[place + 1])
        up_NR[target.row : target.row + target.rows, columns] += block
    return torch.cat(downs), up_NR


def _concatenated(
    parts: Sequence[LowRank], name: str, dtype: torch.dtype, device: torch.device
) -> LowRank:
    down_RK = torch.cat([down for down, _ in parts])
    up_NR = torch.cat([up for _, up in parts], dim=1)
    rank = len(down_RK)
    if rank > MAX_RANK:
        raise WeightsError(
            f"the LoRAs add up to rank {rank} in the layer {name}, at most {MAX_RANK} is possible; "
            "use fewer of them at once"
        )
    padding = -rank % RANK_MULTIPLE
    down_RK = F.pad(down_RK, (0, 0, 0, padding)).to(device, dtype)
    up_NR = F.pad(up_NR, (0, padding)).to(device, dtype)
    if not (down_RK.isfinite().all() and up_NR.isfinite().all()):
        raise WeightsError(
            f"a LoRA of the layer {name} has numbers too large for {dtype}; use a lower strength, "
            "or run the model in bfloat16 or float32"
        )
    return down_RK, up_NR
