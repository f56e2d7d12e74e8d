"""The verdict: cuts placed in the picture, flagged, scored, and refused with a reason."""

import numpy as np

from gesso_core.annotate.char_sam.characters import Cut
from gesso_core.annotate.char_sam.graphemes import script_of
from gesso_core.annotate.char_sam.view import WordView
from gesso_core.annotate.char_sam.words import CharacterMask, Flag, PlacedMask, WordResult
from gesso_core.annotate.masks import Mask, box_of_mask

# H, W crop

SMALL = 4  # pixels


def word_flags(view: WordView, size: tuple[int, int]) -> tuple[Flag, ...]:
    """What is to be said about the word's polygon in a picture of (H, W)."""
    height, width = size
    x0, y0, x1, y1 = view.annotation.hull
    flags: list[Flag] = []
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
        flags.append("clipped")
    if view.reading.moved:
        flags.append("start_moved")
    return tuple(flags)


def judged(cut: Cut, view: WordView, min_score: float) -> CharacterMask:
    """A cut placed in the picture, judged."""
    mask = placed(cut.mask_HW, view.origin)
    flags = cut.flags
    if mask.area and min(mask.window_hw.shape) < SMALL:
        flags = (*flags, "small")
    x, y = view.origin
    x0, y0, x1, y1 = cut.segment.box
    return CharacterMask(
        char=cut.segment.cluster,
        index=cut.segment.index,
        box=(x0 + x, y0 + y, x1 + x, y1 + y),
        quad=tuple((u + x, v + y) for u, v in cut.segment.quad),
        mask=mask,
        score=cut.score if mask.area else 0.0,
        flags=tuple(dict.fromkeys(flags)),
        refused=_reason(cut, mask, flags, min_score),
    )


def _reason(cut: Cut, mask: PlacedMask, flags: tuple[Flag, ...], min_score: float) -> str | None:
    """Why a character's mask should not be used unseen."""
    char = cut.segment.cluster
    if not mask.area:
        return f"empty: the segmenter found nothing of {char!r}"
    if cut.score >= min_score:
        return None
    score = f"the score is {cut.score:.2f}, at least {min_score:.2f} is asked for"
    if "no_glyph" in flags:
        return f"no glyph: no font has {char!r} ({script_of(char)}), add a font folder; {score}"
    if "low_ink" in flags:
        return f"low ink: hardly anything of {char!r} differs from the background; {score}"
    if "glyph_mismatch" in flags:
        return f"glyph mismatch: what was found does not look like {char!r}; {score}"
    return f"low score: {char!r}: {score}"


def word_result(
    view: WordView, characters: tuple[CharacterMask, ...], flags: tuple[Flag, ...], seconds: float
) -> WordResult:
    """The word with its union mask; its score is the lowest of its characters."""
    refused = [character.refused for character in characters if character.refused]
    union_HW = np.zeros(view.size, dtype=bool)
    for character in characters:
        local = PlacedMask(
            character.mask.x - view.origin[0],
            character.mask.y - view.origin[1],
            character.mask.window_hw,
        )
        local.add_to(union_HW)
    everything = (*flags, *(flag for character in characters for flag in character.flags))
    return WordResult(
        annotation=view.annotation,
        characters=characters,
        mask=placed(union_HW, view.origin),
        score=min((character.score for character in characters), default=0.0),
        flags=tuple(dict.fromkeys(everything)),
        refused=refused[0] if refused else None,
        seconds=seconds,
    )


def placed(mask_HW: Mask, origin: tuple[int, int]) -> PlacedMask:
    """A crop's mask as a tight window of the picture."""
    x0, y0, x1, y1 = box_of_mask(mask_HW)
    window_hw = np.ascontiguousarray(mask_HW[y0:y1, x0:x1])
    return PlacedMask(origin[0] + x0, origin[1] + y0, window_hw)
