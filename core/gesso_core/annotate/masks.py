"""Binary masks: COCO run-length codes, boxes, and how well two masks agree.

COCO counts pixels column by column: the first run is background (and may be 0), then foreground and
background take turns. The compressed form writes every run, from the fourth on as the difference to
the run two before it, in groups of five bits, lowest first; a sixth bit says that more follow, and
48 is added so that each group is a printable character.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Box
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import MAX_PIXELS

# H, W picture

Mask = NDArray[np.bool_]
PixelBox = tuple[int, int, int, int]

_LONGEST_NUMBER = 60  # bits of one packed run


class RunLengths(TypedDict):
    """A mask in COCO's notation; ``counts`` is a list of runs, or the string that packs them."""

    size: list[int]
    counts: str | list[int]


@dataclass(frozen=True)
class Overlap:
    """Pixels of a prediction against the truth; add two to pool them. A ratio of nothing is 0."""

    hit: int = 0
    wrong: int = 0
    missed: int = 0

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.hit + other.hit, self.wrong + other.wrong, self.missed + other.missed)

    @property
    def iou(self) -> float:
        """Foreground IoU, TP / (TP + FP + FN)."""
        return _ratio(self.hit, self.hit + self.wrong + self.missed)

    @property
    def f(self) -> float:
        """F score, 2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.hit, 2 * self.hit + self.wrong + self.missed)

    @property
    def precision(self) -> float:
        """Share of the prediction that is right."""
        return _ratio(self.hit, self.hit + self.wrong)

    @property
    def recall(self) -> float:
        """Share of the truth that was found."""
        return _ratio(self.hit, self.hit + self.missed)


def overlap(predicted_HW: Mask, true_HW: Mask, ignore_HW: Mask | None = None) -> Overlap:
    """Compare two masks, leaving the pixels of ``ignore_HW`` out of both."""
    if ignore_HW is not None:
        predicted_HW, true_HW = predicted_HW & ~ignore_HW, true_HW & ~ignore_HW
    hit = int(np.count_nonzero(predicted_HW & true_HW))
    return Overlap(
        hit, int(np.count_nonzero(predicted_HW)) - hit, int(np.count_nonzero(true_HW)) - hit
    )


def pooled(overlaps: Iterable[Overlap]) -> Overlap:
    """The overlap of a data set: pixels of all its pictures together."""
    return sum(overlaps, start=Overlap())


def mask_iou(a_HW: Mask, b_HW: Mask) -> float:
    """Intersection over union; 0 when both are empty."""
    return overlap(a_HW, b_HW).iou


def box_of_mask(mask_HW: Mask) -> PixelBox:
    """(x0, y0, x1, y1) with exclusive ends; all zero for an empty mask."""
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    if not columns.size:
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def clip_to(mask_HW: Mask, box: Box, *, grow: float = 0.0) -> Mask:
    """The mask inside a box (x0, y0, x1, y1) grown by some pixels; pixels cut by it stay whole."""
    x0, y0, x1, y1 = box
    clipped_HW = np.zeros_like(mask_HW)
    rows = slice(max(math.floor(y0 - grow), 0), max(math.ceil(y1 + grow), 0))
    columns = slice(max(math.floor(x0 - grow), 0), max(math.ceil(x1 + grow), 0))
    clipped_HW[rows, columns] = mask_HW[rows, columns]
    return clipped_HW


def area(mask: Mask | RunLengths) -> int:
    """Foreground pixels; of run lengths without unpacking them to pixels."""
    if isinstance(mask, np.ndarray):
        return int(np.count_nonzero(mask))
    return sum(_runs(mask)[1::2])


def encode_mask(mask_HW: Mask, *, compressed: bool = True) -> RunLengths:
    """The mask as COCO run lengths, equal to pycocotools' (whose string is bytes)."""
    runs = mask_runs(mask_HW)
    return {"size": list(mask_HW.shape), "counts": pack_runs(runs) if compressed else runs}


def decode_mask(code: RunLengths) -> Mask:
    """The pixels of COCO run lengths, packed or not.

    Raises InvalidRequest when the text is damaged, the runs do not fill the size, or no picture
    can be so large.
    """
    height, width = code["size"]
    if min(height, width) < 0 or height * width > MAX_PIXELS:
        raise InvalidRequest(
            f"a mask of {width}x{height}; expected at most {MAX_PIXELS:,} pixels", field="size"
        )
    runs = _runs(code)
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise InvalidRequest(
            f"the runs cover {sum(runs)} pixels, a {width}x{height} mask has "
            f"{height * width}; the run lengths are damaged or belong to another size",
            field="counts",
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def mask_runs(mask_HW: Mask) -> list[int]:
    """Lengths of alternating runs in column order, background first."""
    flat = np.asarray(mask_HW, dtype=bool).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def pack_runs(runs: Sequence[int]) -> str:
    """Runs as COCO's text."""
    return "".join(
        _pack_number(run - runs[place - 2] if place > 2 else run) for place, run in enumerate(runs)
    )


def unpack_runs(text: str) -> list[int]:
    """The inverse of `pack_runs`; raises InvalidRequest for text that ends early or is foreign."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise InvalidRequest(
                f"{character!r} does not occur in COCO run lengths", field="counts"
            )
        value |= (group & 0x1F) << shift
        shift += 5
        if shift > _LONGEST_NUMBER:
            raise InvalidRequest("the run lengths hold a number that is too long", field="counts")
        if group & 0x20:
            continue
        if group & 0x10:  # the last group carries the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise InvalidRequest("the run lengths end in the middle of a number", field="counts")
    return runs


def _pack_number(number: int) -> str:
    characters = []
    while True:
        group, number = number & 0x1F, number >> 5
        finished = number == (-1 if group & 0x10 else 0)
        characters.append(chr(48 + (group if finished else group | 0x20)))
        if finished:
            return "".join(characters)


def _runs(code: RunLengths) -> list[int]:
    counts = code["counts"]
    return unpack_runs(counts) if isinstance(counts, str) else counts


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
