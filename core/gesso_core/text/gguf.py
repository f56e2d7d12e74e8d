"""Reader of GGUF files: metadata and tensors as stored bytes. Nothing in the file is executed.

Layout (versions 2 and 3, little endian): magic, version, tensor count, pair count; the metadata
pairs; the tensor infos (name, dimensions innermost first, type, offset); padding; tensor data.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gesso_core.errors import WeightsError

SCALAR_FORMATS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING: Final = 8
ARRAY: Final = 9
# type number: (name, weights per block, bytes per block)
TENSOR_TYPES: Final = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    3: ("q4_1", 32, 20),
    8: ("q8_0", 32, 34),
}


@dataclass(frozen=True)
class GGUFTensor:
    """``shape`` is outermost first; ``rows_RS`` are the stored bytes, (shape[0], bytes per row)."""

    shape: tuple[int, ...]
    type_name: str
    rows_RS: NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors of one file."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(data: bytes) -> GGUFFile:
    """Parse a whole file held in memory; `WeightsError` where it is truncated or another kind."""
    if data[:4] != b"GGUF":
        raise WeightsError(f"not a GGUF file: it starts with {data[:4]!r}, expected b'GGUF'")
    try:
        return _parse(data)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise WeightsError(
            f"not a readable GGUF file ({error}); it may be truncated, download it again"
        ) from error


def _parse(data: bytes) -> GGUFFile:
    cursor = _Cursor(data, offset=4)
    version, tensor_count, pair_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise WeightsError(f"GGUF version {version} is not supported; supported: 2 and 3")
    metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(pair_count)}
    infos = [cursor.tensor_info() for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.offset // alignment) * alignment
    tensors = {name: _tensor(data, shape, kind, start + at) for name, shape, kind, at in infos}
    return GGUFFile(metadata, tensors)


def _tensor(data: bytes, shape: tuple[int, ...], type_number: int, offset: int) -> GGUFTensor:
    type_name, block_weights, block_bytes = TENSOR_TYPES[type_number]
    size = prod(shape) // block_weights * block_bytes
    stored = np.frombuffer(data, np.uint8, count=size, offset=offset)
    return GGUFTensor(shape, type_name, stored.reshape(shape[0] if len(shape) > 1 else 1, -1))


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.offset = data, offset

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        if self.offset + length > len(self.data):
            raise ValueError(f"a string of {length} bytes passes the end of the file")
        raw = self.data[self.offset : self.offset + length]
        self.offset += length
        return raw.decode()

    def value(self, type_number: int) -> Any:
        if type_number == STRING:
            return self.string()
        if type_number == ARRAY:
            item_type, count = self.number("I"), self.number("Q")
            return [self.value(item_type) for _ in range(count)]
        return self.number(SCALAR_FORMATS[type_number])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
        return name, shape, self.number("I"), self.number("Q")
