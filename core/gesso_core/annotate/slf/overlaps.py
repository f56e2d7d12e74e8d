"""Which object a pixel belongs to where masks overlap: the nearer one."""

# N objects   H W picture

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Box
from gesso_core.annotate.masks import Mask


@dataclass(frozen=True)
class OwnedMask:
    """The pixels of one object, and those that a nearer object hides from it."""

    mask_HW: Mask
    hidden_HW: Mask  # says nothing of this object, which may go on behind


def nearest_first(boxes: Sequence[Box], depths: Sequence[float]) -> list[int]:
    """Order by the lower edge of the box (lower is nearer), then by median LiDAR depth (metres)."""
    return sorted(range(len(boxes)), key=lambda i: (-round(boxes[i][3]), depths[i]))


def resolve(
    masks: Sequence[Mask], boxes: Sequence[Box], depths: Sequence[float]
) -> list[OwnedMask]:
    """Take from each mask the pixels of nearer ones; the result keeps the order of the input."""
    owned: dict[int, OwnedMask] = {}
    taken: NDArray[np.bool_] = np.zeros_like(masks[0]) if masks else np.zeros((0, 0), bool)
    for i in nearest_first(boxes, depths):
        owned[i] = OwnedMask(masks[i] & ~taken, taken.copy())
        taken |= masks[i]
    return [owned[i] for i in range(len(masks))]


def leave_alone(masks: Sequence[Mask]) -> list[OwnedMask]:
    """Every mask as it is: what `resolve` is measured against."""
    return [OwnedMask(mask, np.zeros_like(mask)) for mask in masks]
