"""Triangle surfaces out of OBJ and PLY files.

Only what a surface is made of is read: vertices and faces. Colours, normals, textures and groups
are passed over; a face of more than three corners becomes a fan of triangles.
"""

# V vertices   F faces

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.slf.meshes import Mesh
from gesso_core.errors import InvalidRequest

SUFFIXES: Final = (".obj", ".ply")
_MOST_BYTES: Final = 256 * 1024**2
_TYPES: Final = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDERS: Final = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": None}
Row = Sequence[float]


def read_mesh(path: Path) -> Mesh:
    """The surface in an OBJ or PLY file, in its own axes and units.

    Raises:
        InvalidRequest: another kind of file, a damaged one, or one without faces.
    """
    readers = {".obj": _read_obj, ".ply": _read_ply}
    if path.suffix.lower() not in readers:
        raise _damaged(path, f"ends in none of {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _damaged(path, f"has more than {_MOST_BYTES >> 20} MiB")
        vertices, faces = readers[path.suffix.lower()](path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise _damaged(path, f"is damaged: {error}") from error
    if not len(faces):
        raise _damaged(path, "has no faces")
    if faces.min() < 0 or faces.max() >= len(vertices) or not np.isfinite(vertices).all():
        raise _damaged(path, "names vertices that it does not have, or that are no numbers")
    return Mesh(vertices.astype(np.float32), faces.astype(np.uint32))


def _damaged(path: Path, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{path} {problem}; expected is a mesh as OBJ or PLY", field="meshes")


def _fan(corners: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for second, third in pairwise(corners[1:]):
        yield corners[0], second, third


def _read_obj(data: bytes) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    vertices: list[tuple[float, ...]] = []
    faces: list[tuple[int, int, int]] = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            vertices.append(tuple(map(float, words[:3])))
        elif kind == "f":
            given = [int(word.split("/")[0]) for word in words]
            # They count from 1, or from the last vertex so far backwards.
            faces += _fan([n - 1 if n > 0 else len(vertices) + n for n in given])
    return np.array(vertices, np.float64).reshape(-1, 3), np.array(faces, np.int64).reshape(-1, 3)


def _read_ply(data: bytes) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    header, mark, body = data.partition(b"end_header")
    if not mark or not header.startswith(b"ply"):
        raise ValueError("it has no PLY header")
    order, elements = _ply_header(header.decode("ascii", errors="replace").splitlines()[1:])
    body = body[body.index(b"\n") + 1 :]
    rows = _text_rows(body, elements) if order is None else _binary_rows(body, elements, order)
    vertices, faces = [], list[tuple[int, int, int]]()
    for element, row in rows:
        if element.name == "vertex":
            vertices.append([row[element.scalars.index(axis)] for axis in "xyz"])
        elif element.name == "face":
            faces += _fan([int(n) for n in row])
    return np.array(vertices, np.float64).reshape(-1, 3), np.array(faces, np.int64).reshape(-1, 3)


@dataclass
class _Element:
    """One kind of row of a PLY file: scalars alone, or a list and then scalars."""

    name: str
    count: int
    scalars: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)  # of the scalars
    lists: list[tuple[str, str]] = field(default_factory=list)  # types of length and entries

    def add(self, words: list[str]) -> None:
        """Another property."""
        if words[0] != "list":
            self.types.append(_TYPES[words[0]])
            self.scalars.append(words[1])
        elif self.lists or self.scalars:
            raise ValueError(f"{self.name}: only one list, before the other properties, is read")
        else:
            self.lists.append((_TYPES[words[1]], _TYPES[words[2]]))


def _ply_header(lines: list[str]) -> tuple[str | None, list[_Element]]:
    order: str | None = None
    elements: list[_Element] = []
    for kind, *words in (line.split() for line in lines if line.strip()):
        if kind == "format":
            order = _ORDERS[words[0]]
        elif kind == "element":
            elements.append(_Element(words[0], int(words[1])))
        elif kind == "property":
            elements[-1].add(words)
    return order, elements


def _text_rows(body: bytes, elements: list[_Element]) -> Iterator[tuple[_Element, Row]]:
    lines = iter(body.decode("ascii", errors="replace").splitlines())
    for element in elements:
        for _ in range(element.count):
            numbers = [float(word) for word in next(lines, "").split()]
            yield element, numbers[1 : 1 + int(numbers[0])] if element.lists else numbers


def _binary_rows(
    body: bytes, elements: list[_Element], order: str
) -> Iterator[tuple[_Element, Row]]:
    at = 0
    for element in elements:
        scalars = np.dtype([(str(i), order + kind) for i, kind in enumerate(element.types)])
        if not element.lists:
            table = np.frombuffer(body, scalars, element.count, at)
            at += table.nbytes
            yield from ((element, row) for row in table.tolist())
            continue
        count_type, entry_type = (np.dtype(order + kind) for kind in element.lists[0])
        for _ in range(element.count):
            (length,) = np.frombuffer(body, count_type, 1, at)
            at += count_type.itemsize
            yield element, np.frombuffer(body, entry_type, int(length), at).tolist()
            at += int(length) * entry_type.itemsize + scalars.itemsize
