"""Small things are looked at through a window: cut out, embedded on its own, masks put back.

SAM's logits have 256 numbers along the longest side of what it sees, so a letter of a street scene
is a few of them. A box whose shorter side is under a sixth of the picture's longest side gets a
window: the box and half its shorter side around it, at least 64 px.

A window costs as much as a picture. Where more than four are wanted at once, all prompts look at
the whole picture, so that many boxes never cost much more than one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from gesso_core.annotate.geometry import Box
from gesso_core.annotate.masks import PixelBox
from gesso_core.annotate.segmenter.contract import (
    Masks,
    Prompt,
    Segmenter,
    check_picture,
    check_prompts,
)
from gesso_core.pipelines.pictures import Pixels

SMALL: Final = 1 / 6
MARGIN: Final = 0.5
LEAST_WINDOW: Final = 64
MOST_WINDOWS: Final = 4
AT_ONCE: Final = 8  # prompts whose masks are in memory together


def crop_window(box: Box, size: tuple[int, int]) -> PixelBox | None:
    """The window (x0, y0, x1, y1) through which to look at a box; None for the whole picture."""
    if min(box[2] - box[0], box[3] - box[1]) >= SMALL * max(size):
        return None
    return window_around(box, size)


def window_around(box: Box, size: tuple[int, int]) -> PixelBox:
    """The box and its surroundings (x0, y0, x1, y1), as far as a picture of (H, W) reaches."""
    x0, y0, x1, y1 = box
    margin = MARGIN * min(x1 - x0, y1 - y0)
    left, right = _span(x0 - margin, x1 + margin, size[1])
    top, bottom = _span(y0 - margin, y1 + margin, size[0])
    return left, top, right, bottom


def segment(
    segmenter: Segmenter,
    picture_HW3: Pixels,
    prompts: Sequence[Prompt],
    *,
    multimask: bool = False,
) -> Iterator[tuple[list[int], Masks]]:
    """Masks at the picture's size, small boxes through windows, a few prompts at a time.

    Yields the numbers of some prompts and their masks; together all prompts, so that the masks of a
    large picture need not be in memory at once. Nothing outside a window is foreground, and where a
    prompt looked decides what its ``low_res_PLL`` covers.
    """
    check_picture(picture_HW3)
    size = picture_HW3.shape[:2]
    check_prompts(prompts, size)
    for window, places in by_window(prompts, size).items():
        x0, y0, x1, y1 = window
        embedding = segmenter.embed(np.ascontiguousarray(picture_HW3[y0:y1, x0:x1]))
        for start in range(0, len(places), AT_ONCE):
            group = places[start : start + AT_ONCE]
            moved = [_moved(prompts[place], -x0, -y0) for place in group]
            masks = segmenter.predict(embedding, moved, multimask=multimask)
            yield group, _put_back(masks, window, size)


def by_window(prompts: Sequence[Prompt], size: tuple[int, int]) -> dict[PixelBox, list[int]]:
    """Where to look, windows or the whole picture, and the numbers of the prompts for each.

    Prompts without a box, with a former mask, or with a point beyond their window look at the whole
    picture, and so do all where more than `MOST_WINDOWS` are wanted.
    """
    whole = (0, 0, size[1], size[0])
    windows: dict[PixelBox, list[int]] = {}
    for place, prompt in enumerate(prompts):
        windows.setdefault(_window_of(prompt, size) or whole, []).append(place)
    if len(windows.keys() - {whole}) > MOST_WINDOWS:
        return {whole: list(range(len(prompts)))}
    return windows


def _window_of(prompt: Prompt, size: tuple[int, int]) -> PixelBox | None:
    if prompt.box is None or prompt.mask_LL is not None:
        return None
    window = crop_window(prompt.box, size)
    if window is None:
        return None
    x0, y0, x1, y1 = window
    return window if all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in prompt.points) else None


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """Whole pixels around [low, high], at least 64 of them where the picture has so many."""
    missing = max(LEAST_WINDOW - (high - low), 0) / 2
    first, last = int(np.floor(low - missing)), int(np.ceil(high + missing))
    if first < 0:
        last = max(last, min(LEAST_WINDOW, length))
    if last > length:
        first = min(first, max(length - LEAST_WINDOW, 0))
    return max(first, 0), min(last, length)


def _moved(prompt: Prompt, dx: float, dy: float) -> Prompt:
    box = prompt.box
    if box is not None:
        box = (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy)
    return replace(prompt, box=box, points=tuple((x + dx, y + dy) for x, y in prompt.points))


def _put_back(masks: Masks, window: PixelBox, size: tuple[int, int]) -> Masks:
    x0, y0, x1, y1 = window
    if (y1 - y0, x1 - x0) == size:
        return masks
    whole_PHW = np.zeros((len(masks), *size), dtype=np.bool_)
    whole_PHW[:, y0:y1, x0:x1] = masks.masks_PHW
    found = masks.candidates
    if found is not None:
        whole_PMHW = np.zeros((*found.masks_PMHW.shape[:2], *size), dtype=np.bool_)
        whole_PMHW[..., y0:y1, x0:x1] = found.masks_PMHW
        found = replace(found, masks_PMHW=whole_PMHW)
    return replace(masks, masks_PHW=whole_PHW, candidates=found)
