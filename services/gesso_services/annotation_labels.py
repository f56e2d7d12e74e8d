"""Results of the core as messages, and back: what lies in the blob ``labels`` of a job.

The gateway reads them, too, so nothing here needs torch.

Masks are coded from their window alone, so that a picture of 16 megapixels with a thousand
characters costs no more than its characters.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np
from gesso_contracts import annotations as a
from gesso_core.annotate.char_sam.words import (
    FLAGS,
    CharacterMask,
    Flag,
    PictureResult,
    PlacedMask,
    WordAnnotation,
    WordResult,
    polygon_mask,
    summarize,
)
from gesso_core.annotate.masks import Mask, mask_runs, pack_runs, unpack_runs
from gesso_core.errors import InvalidRequest

Size = tuple[int, int]

_KNOWN_FLAGS: Final[dict[str, Flag]] = {name: name for name in FLAGS}  # type: ignore[misc]


def text_labels(result: PictureResult) -> a.TextLabels:
    """All words of a picture as a message."""
    height, width = result.size
    return a.TextLabels(
        width=width, height=height, words=[_word(word, result.size) for word in result.words]
    )


def picture_result(labels: a.TextLabels) -> PictureResult:
    """The inverse of `text_labels`, for the writers of data sets."""
    return PictureResult(
        size=(labels.height, labels.width),
        words=tuple(_word_result(word) for word in labels.words),
    )


def text_summary(result: PictureResult) -> a.TextSummary:
    """Words and characters counted."""
    counted = summarize([result])
    characters = [c for word in result.words for c in word.characters if c.refused is None]
    return a.TextSummary(
        words=counted.words,
        labelled=counted.labelled,
        ignored=counted.ignored,
        characters=len(characters),
        flagged=dict(counted.flagged),
        refused=dict(counted.refused),
    )


def word_annotation(word: a.WordSpec) -> WordAnnotation:
    """A word of a request as the core takes it."""
    return WordAnnotation(
        text=word.text, polygon=tuple(word.polygon), script=word.script, ignore=word.ignore
    )


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs; a reason counts by its text up to the first colon."""
    return dict(sorted(Counter(name.partition(":")[0] for name in names).items()))


def mask_code(mask: PlacedMask, size: Size) -> a.MaskCode:
    """The run lengths of a mask that fills only its window of the picture."""
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
    return a.MaskCode(size=size, counts=pack_runs(runs))


def whole_code(mask_HW: Mask) -> a.MaskCode:
    """The run lengths of a mask of the whole picture."""
    height, width = mask_HW.shape
    return a.MaskCode(size=(height, width), counts=pack_runs(mask_runs(mask_HW)))


def placed_mask(code: a.MaskCode) -> PlacedMask:
    """The window of a coded mask; InvalidRequest when the runs do not fill the picture."""
    height, width = code.size
    runs = np.array(unpack_runs(code.counts), dtype=np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise InvalidRequest(
            f"the runs cover {int(runs.sum())} pixels, a {width}x{height} mask has "
            f"{height * width}; the run lengths are damaged or belong to another size",
            field="counts",
        )
    if len(runs) < 2:
        return PlacedMask(0, 0, np.zeros((0, 0), dtype=bool))
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


def _word(word: WordResult, size: Size) -> a.AnnotatedWord:
    given = word.annotation
    return a.AnnotatedWord(
        text=given.text,
        polygon=list(given.polygon),
        script=given.script,
        ignore=given.ignore,
        source=given.source,
        confidence=given.confidence,
        mask=_ignored(given, size) if given.ignore else mask_code(word.mask, size),
        score=word.score,
        flags=list(word.flags),
        refused=word.refused,
        characters=[
            a.AnnotatedCharacter(
                char=character.char,
                index=character.index,
                box=character.box,
                quad=list(character.quad),
                mask=mask_code(character.mask, size),
                score=character.score,
                flags=list(character.flags),
                refused=character.refused,
            )
            for character in word.characters
        ],
    )


def _ignored(word: WordAnnotation, size: Size) -> a.MaskCode:
    return whole_code(polygon_mask(word.polygon, size))


def _word_result(word: a.AnnotatedWord) -> WordResult:
    annotation = WordAnnotation(
        text=word.text,
        polygon=tuple(word.polygon),
        script=word.script,
        ignore=word.ignore,
        source=word.source,
        confidence=word.confidence,
    )
    return WordResult(
        annotation=annotation,
        characters=tuple(_character_mask(character) for character in word.characters),
        mask=placed_mask(word.mask),
        score=word.score,
        flags=_flags(word.flags),
        refused=word.refused,
    )


def _character_mask(character: a.AnnotatedCharacter) -> CharacterMask:
    return CharacterMask(
        char=character.char,
        index=character.index,
        box=character.box,
        quad=tuple(character.quad),
        mask=placed_mask(character.mask),
        score=character.score,
        flags=_flags(character.flags),
        refused=character.refused,
    )


def _flags(names: Iterable[str]) -> tuple[Flag, ...]:
    return tuple(_KNOWN_FLAGS[name] for name in names if name in _KNOWN_FLAGS)
