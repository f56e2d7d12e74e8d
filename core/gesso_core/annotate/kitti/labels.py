"""KITTI's label lines: 15 columns, a 16th (score) in results.

``type truncated occluded alpha left top right bottom height width length x y z rotation_y [score]``

Sizes are in metres in the order height, width, length; (x, y, z) is the centre of the bottom face
in the rectified camera frame; angles are radians; pixels count from 0.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Box
from gesso_core.errors import InvalidRequest

DONT_CARE = "DontCare"
UNKNOWN_ALPHA = -10.0
_COLUMNS = (15, 16)


@dataclass(frozen=True, kw_only=True)
class KittiObject:
    """One line of a label file."""

    kind: str
    truncated: float = -1.0  # 0..1 share outside the picture, -1 unknown
    occluded: int = -1  # 0 visible, 1 partly, 2 largely, 3 unknown
    alpha: float = UNKNOWN_ALPHA  # observation angle
    box2d: Box  # left, top, right, bottom
    size: tuple[float, float, float] = (-1.0, -1.0, -1.0)  # height, width, length
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    rotation_y: float = -10.0
    score: float | None = None

    @property
    def box3d(self) -> tuple[float, ...]:
        """(h, w, l, x, y, z, rotation_y), as `boxes` wants it."""
        return (*self.size, *self.location, self.rotation_y)

    @property
    def is_dont_care(self) -> bool:
        """A region whose detections are not counted."""
        return self.kind.lower() == DONT_CARE.lower()


def boxes3d(objects: Iterable[KittiObject]) -> NDArray[np.float64]:
    """The boxes of several objects, (N, 7)."""
    return np.array([o.box3d for o in objects], dtype=np.float64).reshape(-1, 7)


def boxes2d(objects: Iterable[KittiObject]) -> NDArray[np.float64]:
    """The picture boxes of several objects, (N, 4)."""
    return np.array([o.box2d for o in objects], dtype=np.float64).reshape(-1, 4)


def parse_labels(text: str, source: str = "labels") -> list[KittiObject]:
    """Every line of a label file, which may be empty.

    Raises:
        InvalidRequest: a line with another number of columns, or with something that is no number.
    """
    lines = enumerate(text.splitlines(), start=1)
    return [_parse_line(line, f"{source}, line {n}") for n, line in lines if line.strip()]


def _parse_line(line: str, where: str) -> KittiObject:
    kind, *columns = line.split()
    if len(columns) + 1 not in _COLUMNS:
        raise InvalidRequest(
            f"{where}: {len(columns) + 1} columns, but a label has 15 and a result 16",
            field="labels",
        )
    try:
        v = [float(column) for column in columns]
    except ValueError as error:
        raise InvalidRequest(f"{where}: {error}", field="labels") from error
    if not all(map(math.isfinite, v)):
        raise InvalidRequest(f"{where}: every column must be a finite number", field="labels")
    return KittiObject(
        kind=kind,
        truncated=v[0],
        occluded=round(v[1]),
        alpha=v[2],
        box2d=(v[3], v[4], v[5], v[6]),
        size=(v[7], v[8], v[9]),
        location=(v[10], v[11], v[12]),
        rotation_y=v[13],
        score=v[14] if len(v) == 15 else None,
    )


def format_object(item: KittiObject) -> str:
    """The line of one object: two decimals, four for the score, as KITTI writes it."""
    if item.is_dont_care:
        box = " ".join(f"{side:.2f}" for side in item.box2d)
        return f"{item.kind} -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10"
    numbers = (item.alpha, *item.box2d, *item.size, *item.location, item.rotation_y)
    line = f"{item.kind} {item.truncated:.2f} {item.occluded} "
    line += " ".join(f"{_no_minus_zero(number):.2f}" for number in numbers)
    return line if item.score is None else f"{line} {item.score:.4f}"


def _no_minus_zero(number: float) -> float:
    return 0.0 if abs(number) < 0.005 else number


def format_labels(objects: Iterable[KittiObject]) -> str:
    """The text of a label file; no objects make an empty file."""
    return "".join(f"{format_object(item)}\n" for item in objects)


def read_labels(path: Path) -> list[KittiObject]:
    """`parse_labels` of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="labels") from error
    return parse_labels(text, str(path))
