"""Small things are looked at through a window: cut out, embedded on its own, masks put back.

SAM's logits have 256 numbers along the longest side of what it sees, so a letter of a street scene
is a few of them. A box whose shorter side is under a sixth of the picture's longest side gets a
window: the box and half its shorter side around it, at least 64 px.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from gesso_core.annotate.masks import PixelBox
from gesso_core.annotate.segmenter.cache import EmbeddingCache
from gesso_core.annotate.segmenter.contract import (
    Box,
    Masks,
    Prompt,
    Segmenter,
    check_picture,
    check_prompts,
    joined,
)
from gesso_core.pipelines.pictures import Pixels

SMALL: Final = 1 / 6
MARGIN: Final = 0.5
LEAST_WINDOW: Final = 64


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
    cache: EmbeddingCache | None = None,
    multimask: bool = False,
) -> Masks:
    """One mask per prompt at the picture's size, small boxes through windows.

    Prompts without a box, with a former mask, or with a point beyond their window look at the whole
    picture. Prompts whose windows are equal share an embedding; where each looked decides what its
    ``low_res_PLL`` covers.
    """
    check_picture(picture_HW3)
    size = picture_HW3.shape[:2]
    check_prompts(prompts, size)
    windows: dict[PixelBox | None, list[int]] = {}
    for place, prompt in enumerate(prompts):
        windows.setdefault(_window_of(prompt, size), []).append(place)
    answers = [
        predict_in_window(
            segmenter,
            picture_HW3,
            window,
            [prompts[place] for place in places],
            cache=cache,
            multimask=multimask,
        )
        for window, places in (windows or {None: []}).items()
    ]
    asked = [place for places in windows.values() for place in places]
    return joined(answers).rows(np.argsort(np.array(asked, dtype=np.int64)).tolist())


def predict_in_window(
    segmenter: Segmenter,
    picture_HW3: Pixels,
    window: PixelBox | None,
    prompts: Sequence[Prompt],
    *,
    cache: EmbeddingCache | None = None,
    multimask: bool = False,
) -> Masks:
    """Masks of prompts given in the picture, seen through one window of it.

    Nothing outside the window is foreground. Points outside it are refused; a former mask must be
    of the same window.
    """
    if window is None:
        window = (0, 0, picture_HW3.shape[1], picture_HW3.shape[0])
    x0, y0, x1, y1 = window
    seen_HW3 = np.ascontiguousarray(picture_HW3[y0:y1, x0:x1])
    # An empty cache has the length 0, which counts as false.
    embed = segmenter.embed if cache is None else partial(cache.embed, segmenter)
    embedding = embed(seen_HW3)
    moved = [_moved(prompt, -x0, -y0) for prompt in prompts]
    masks = segmenter.predict(embedding, moved, multimask=multimask)
    return _put_back(masks, window, picture_HW3.shape[:2])


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
