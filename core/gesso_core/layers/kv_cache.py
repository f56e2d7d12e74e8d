"""Keys and values of rows that are written step by step.

`KVRows` is a value: appending gives a new one, a slot or more longer, and the old one stays valid.
Both share their memory, because slots behind a value's own length are nobody's. So a step that
failed can be repeated from where it began, and a draft may hold on to its rows without a copy.

Rows of different pictures come together for a step with `KVRows.gather`. When the rows asked for
are exactly those of the last step, in their order, nothing is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

# R rows   H heads   T slots of memory   N new slots   d channels of a head

GROWTH = 1.5


@dataclass(eq=False)
class _Memory:
    """What several values share; ``used`` is the length of the newest of them."""

    keys: list[Tensor]  # per layer (R, H, T, d)
    values: list[Tensor]
    used: int = 0


@dataclass(frozen=True, eq=False)
class KVRows:
    """The first ``length`` slots of some rows, for every layer."""

    length: int
    rows: int
    _memory: _Memory = field(repr=False)

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        capacity: int,
        like: Tensor,
    ) -> "KVRows":
        """Rows without a slot, and memory for ``capacity`` slots (more is taken when needed)."""
        shape = (rows, heads, max(1, capacity), head_dim)
        memory = _Memory(
            [like.new_empty(shape) for _ in range(layers)],
            [like.new_empty(shape) for _ in range(layers)],
        )
        return cls(0, rows, memory)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._memory.keys)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (R, H, length, d)."""
        end = self.length
        return self._memory.keys[index][:, :, :end], self._memory.values[index][:, :, :end]

    def writer(self, slots: int) -> "KVWriter":
        """To append ``slots`` slots, layer by layer."""
        memory, length = self._memory, self.length
        capacity = memory.keys[0].shape[2]
        if memory.used != length or capacity < length + slots:
            # Another value has written here, or there is no room: continue in memory of our own.
            room = max(capacity, length + slots)
            if capacity < room:
                room = max(room, int(GROWTH * capacity))
            memory = self._copied(room)
        return KVWriter(KVRows(length + slots, self.rows, memory), length)

    @staticmethod
    def gather(members: Sequence[tuple["KVRows", int]], capacity: int = 0) -> "KVRows":
        """The rows ``(value, row)``, all of one length, as one value.

        The value itself where exactly its rows are asked for, in their order; otherwise a copy.
        ``capacity`` is the memory to take at least.
        """
        first = members[0][0]
        length = first.length
        assert all(value.length == length for value, _ in members), "rows of different lengths"
        if all(value is first for value, _ in members) and [row for _, row in members] == [
            *range(first.rows)
        ]:
            return first
        keys, values = [], []
        for index in range(first.layers):
            like = first._memory.keys[index]
            shape = (len(members), like.shape[1], max(length, capacity), like.shape[3])
            keys.append(like.new_empty(shape))
            values.append(like.new_empty(shape))
            for target, (value, row) in enumerate(members):
                for store, source in zip((keys, values), value.layer(index), strict=True):
                    store[index][target, :, :length] = source[row]
        return KVRows(length, len(members), _Memory(keys, values, used=length))

    def _copied(self, capacity: int) -> _Memory:
        def larger(old: Tensor) -> Tensor:
            rows, heads, _, channels = old.shape
            new = old.new_empty((rows, heads, capacity, channels))
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        keys, values = self._memory.keys, self._memory.values
        return _Memory([larger(t) for t in keys], [larger(t) for t in values], used=self.length)


@dataclass(frozen=True, eq=False)
class KVWriter:
    """Appends one step's slots; ``rows`` is valid once every layer was written."""

    rows: KVRows
    start: int

    def append(self, layer: int, k_RHNd: Tensor, v_RHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new slots of a layer; all its keys and values so far."""
        memory = self.rows._memory
        memory.used = self.rows.length
        memory.keys[layer][:, :, self.start : self.rows.length] = k_RHNd
        memory.values[layer][:, :, self.start : self.rows.length] = v_RHNd
        return self.rows.layer(layer)
