"""A fair sample of a long stream, kept on disk: a few thousand entries of the millions that pass.

Every entry draws a random priority, and those with the smallest priorities stay (bottom-k
sampling): a uniform sample, whatever the length of the stream, which need not be known. Entries
wait in memory until `SampleWriter.flush`, then lie in safetensors shards; when the shards hold
twice the sample, they are thinned to one. So neither memory nor disk grow with the stream.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor

from gesso_core.safe_files import read_tensors

# E entries
Entries = dict[str, Tensor]
PRIORITY: Final = "priority"


class SampleWriter:
    """Takes entries in, keeps at most ``most`` of them in ``folder``.

    An entry is one row of every tensor given to `add`. Tensors of different lengths in their other
    dimensions are padded to the longest with ``fill``.
    """

    def __init__(
        self, folder: Path, most: int, seed: int, fill: Mapping[str, float] | None = None
    ) -> None:
        self.folder, self.most, self.fill = folder, most, fill or {}
        # Layers must not share their choice of tokens, nor depend on the order of other layers.
        self.generator = Generator().manual_seed(seed ^ zlib.crc32(folder.name.encode()))
        self.seen = 0
        self.pending_bytes = 0
        self._pending: list[Entries] = []
        self._kept = 0  # entries on disk and waiting
        self._bound = math.inf  # a priority from here on cannot be in the sample
        self._shards: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, entries: Mapping[str, Tensor]) -> None:
        """Let a batch of entries pass; tensors are (E, …) with one E."""
        count = len(next(iter(entries.values())))
        priority_E = torch.rand(count, generator=self.generator, dtype=torch.float64)
        chosen = (priority_E < self._bound).nonzero().flatten()
        self.seen += count
        if len(chosen) > self.most:  # more than this are never needed of one batch
            smallest = priority_E[chosen].topk(self.most, largest=False).indices
            chosen = chosen[smallest.sort().values]
        if len(chosen) == 0:
            return
        kept = {name: t[chosen.to(t.device)].to("cpu").clone() for name, t in entries.items()}
        kept[PRIORITY] = priority_E[chosen]
        self._pending.append(kept)
        self._kept += len(chosen)
        self.pending_bytes += sum(tensor.nbytes for tensor in kept.values())

    def flush(self) -> None:
        """Move what waits in memory to disk, and thin the shards where they have become many."""
        if self._pending:
            self._write(_joined(self._pending, self.fill))
            self._pending, self.pending_bytes = [], 0
        if self._kept > 2 * self.most:
            self._thin()

    def finish(self) -> None:
        """Leave one shard with exactly the sample, in the order of the stream."""
        self.flush()
        self._thin()

    def _thin(self) -> None:
        if not self._shards:
            return
        old = list(self._shards)
        entries = _joined([read_tensors(path) for path in old], self.fill)
        priority_E = entries[PRIORITY]
        if len(priority_E) > self.most:
            smallest = priority_E.topk(self.most, largest=False)
            self._bound = float(smallest.values.max())
            rows = smallest.indices.sort().values
            entries = {name: tensor[rows].clone() for name, tensor in entries.items()}
        self._shards = []
        self._write(entries, number=_number(old[-1]) + 1)
        self._kept = len(entries[PRIORITY])
        for path in old:
            path.unlink()

    def _write(self, entries: Entries, number: int | None = None) -> None:
        if number is None:
            number = _number(self._shards[-1]) + 1 if self._shards else 0
        path = self.folder / f"{number:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in entries.items()}, path)
        self._shards.append(path)


def read_sample(folder: Path) -> Entries:
    """What a finished `SampleWriter` left in its folder; empty when nothing passed."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        return {}
    entries = _joined([read_tensors(path) for path in shards], {})
    return {name: tensor for name, tensor in entries.items() if name != PRIORITY}


def _joined(parts: Sequence[Entries], fill: Mapping[str, float]) -> Entries:
    return {
        name: torch.cat(_same_shape([part[name] for part in parts], fill.get(name, 0.0)))
        for name in parts[0]
    }


def _same_shape(tensors: Sequence[Tensor], value: float) -> list[Tensor]:
    longest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return [_padded(tensor, longest, value) for tensor in tensors]


def _padded(tensor: Tensor, sizes: Sequence[int], value: float) -> Tensor:
    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    pairs = [amount for extra in reversed(missing) for amount in (0, extra)]
    return F.pad(tensor, pairs, value=value)


def _number(path: Path) -> int:
    return int(path.stem)
