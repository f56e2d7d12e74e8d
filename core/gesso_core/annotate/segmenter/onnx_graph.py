"""What stands in an ONNX file: the constants and the nodes of its graph, without running anything.

An ONNX file is one protobuf message. Only the few fields that carry names, shapes and numbers are
read, by their numbers in ``onnx.proto``; everything else is stepped over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gesso_core.errors import WeightsError

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND = 1, 2, 4
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT: Final = 1

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operation: its kind, and the names of the tensors it reads and writes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in order, and the float32 constants that are stored beside them."""

    nodes: tuple[Node, ...]
    constants: dict[str, NDArray[np.float32]]


def read_graph(path: Path) -> Graph:
    """Nodes and float32 initializers of an ONNX file.

    Raises:
        WeightsError: the file is missing, cut short, or is not ONNX.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    try:
        for number, value in _fields(data):
            if number == _MODEL_GRAPH and isinstance(value, memoryview):
                return _graph(value)
    except (ValueError, IndexError) as error:
        raise WeightsError(f"{path} is not a whole ONNX file: {error}") from error
    raise WeightsError(f"{path} has no graph; expected an ONNX file")


def _graph(data: memoryview) -> Graph:
    nodes, constants = [], {}
    for number, value in _messages(data):
        if number == _GRAPH_NODE:
            nodes.append(_node(value))
        elif number == _GRAPH_INITIALIZER:
            name, tensor = _tensor(value)
            if tensor is not None:
                constants[name] = tensor
    return Graph(tuple(nodes), constants)


def _node(data: memoryview) -> Node:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_KIND: []}
    for number, value in _messages(data):
        if number in texts:
            texts[number].append(bytes(value).decode())
    kind, inputs, outputs = (texts[n] for n in (_NODE_KIND, _NODE_INPUT, _NODE_OUTPUT))
    return Node("".join(kind), tuple(inputs), tuple(outputs))


def _tensor(data: memoryview) -> tuple[str, NDArray[np.float32] | None]:
    name, dtype, dims, raw = "", 0, [], memoryview(b"")
    for number, value in _fields(data):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == _TENSOR_DTYPE and isinstance(value, int):
            dtype = value
        elif isinstance(value, memoryview) and number == _TENSOR_NAME:
            name = bytes(value).decode()
        elif isinstance(value, memoryview) and number == _TENSOR_RAW:
            raw = value
    if dtype != _FLOAT:
        return name, None
    return name, np.frombuffer(raw, dtype="<f4").reshape(dims).copy()


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    for number, value in _fields(data):
        if isinstance(value, memoryview):
            yield number, value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field: whole numbers as int, anything longer as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == _LENGTH:
            length, place = _varint(data, place)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if place + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[place : place + length]
        place += length


def _packed(data: memoryview) -> list[int]:
    numbers, place = [], 0
    while place < len(data):
        number, place = _varint(data, place)
        numbers.append(number)
    return numbers


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, lowest first, and the place behind it."""
    number = shift = 0
    while True:
        group = data[place]
        place += 1
        number |= (group & 0x7F) << shift
        if group < 0x80:
            return number, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
