"""Masks in windows as COCO run lengths of the whole picture, and back, without painting it.

A picture of 16 megapixels with a thousand characters costs no more than its characters.
"""

# H, W picture   w columns of the window

import numpy as np

from gesso_core.annotate.char_sam.words import PlacedMask
from gesso_core.annotate.masks import RunLengths, mask_runs, pack_runs, unpack_runs
from gesso_core.errors import InvalidRequest


def encode_placed(mask: PlacedMask, size: tuple[int, int]) -> RunLengths:
    """The packed run lengths of a mask in a picture of (H, W), equal to those of the whole one."""
    height, width = size
    columns = mask.window_hw.shape[1]
    strip_Hw = np.zeros((height, columns), dtype=bool)
    strip_Hw[mask.y : mask.y + mask.window_hw.shape[0]] = mask.window_hw
    runs = mask_runs(strip_Hw)
    runs[0] += mask.x * height
    after = (width - mask.x - columns) * height
    if len(runs) % 2:  # it ends with background
        runs[-1] += after
    elif after:
        runs.append(after)
    return {"size": [height, width], "counts": pack_runs(runs)}


def decode_placed(counts: str, size: tuple[int, int]) -> PlacedMask:
    """The tight window of a mask in a picture of (H, W).

    Raises InvalidRequest when the runs are damaged or do not fill the picture.
    """
    height, width = size
    lengths = unpack_runs(counts)
    if any(length < 0 for length in lengths) or sum(lengths) != height * width:
        raise InvalidRequest(
            f"the runs cover {sum(lengths)} pixels, a {width}x{height} mask has "
            f"{height * width}; the run lengths are damaged or belong to another size",
            field="counts",
        )
    if not any(lengths[1::2]):
        return PlacedMask(0, 0, np.zeros((0, 0), dtype=bool))
    runs = np.array(lengths, dtype=np.int64)
    ends = runs.cumsum()
    last = len(runs) - 1 - (len(runs) % 2)  # the last run of foreground
    left, right = int(ends[0]) // height, -(-int(ends[last]) // height)
    kept = runs[: last + 1].copy()
    kept[0] -= left * height
    flat = np.repeat(np.arange(len(kept)) % 2 == 1, kept)
    filled = np.zeros((right - left) * height, dtype=bool)
    filled[: len(flat)] = flat
    strip_Hw = filled.reshape(right - left, height).T
    rows = np.flatnonzero(strip_Hw.any(1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return PlacedMask(left, top, np.ascontiguousarray(strip_Hw[top:bottom]))
