"""Binary masks: COCO run-length codes, boxes, and how well two masks agree.

COCO counts pixels column by column: the first run is background (and may be 0), then foreground and
background take turns. The compressed form writes every run, from the fourth on as the difference to
the run two before it, in groups of five bits, lowest first; a sixth bit says that more follow, and
48 is added so that each group is a printable character.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from gesso_core.errors import InvalidRequest

# H, W picture   N, M masks

Mask = NDArray[np.bool_]
PixelBox = tuple[int, int, int, int]


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


def pairwise_iou(a_NHW: Mask, b_MHW: Mask) -> NDArray[np.float64]:
    """IoU of every mask with every other, (N, M); 0 where both are empty."""
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (a_NHW, b_MHW))
    # Sums of ones are exact in float32 up to 2**24 pixels, the largest picture that is opened.
    both: NDArray[np.float64] = (a @ b.T).astype(np.float64)
    either: NDArray[np.float64] = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    return both / np.maximum(either, 1)


def box_of_mask(mask_HW: Mask) -> PixelBox:
    """(x0, y0, x1, y1) with exclusive ends; all zero for an empty mask."""
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    if not columns.size:
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


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

    Raises InvalidRequest when the text is damaged or the runs do not fill the size.
    """
    height, width = code["size"]
    runs = np.array(_runs(code), dtype=np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise InvalidRequest(
            f"the runs cover {int(runs.sum())} pixels, a {width}x{height} mask has "
            f"{height * width}; the run lengths are damaged or belong to another size",
            field="counts",
        )
    flat = np.repeat(np.arange(runs.size) % 2 == 1, runs)
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
