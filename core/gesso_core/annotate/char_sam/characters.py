"""From segments to masks: the box's mask, the glyph registered to it, the glyph's mask, the colour.

Two decoder calls per character, all of a word in two batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.ndimage import binary_dilation

from gesso_core.annotate.char_sam.colour import SEPARATE, separation, stroke_mask
from gesso_core.annotate.char_sam.glyphs import FontSet, turned
from gesso_core.annotate.char_sam.ink import text_colour_ink
from gesso_core.annotate.char_sam.merge import character_score, share_out
from gesso_core.annotate.char_sam.refine_boxes import Segment
from gesso_core.annotate.char_sam.refine_glyphs import Candidate, choose, glyph_prompt
from gesso_core.annotate.char_sam.register import Registration, register, unregistered
from gesso_core.annotate.char_sam.view import WordView, candidates
from gesso_core.annotate.char_sam.words import Flag
from gesso_core.annotate.geometry import Box
from gesso_core.annotate.masks import Mask, clip_to, mask_iou
from gesso_core.annotate.segmenter.contract import Prompt, Segmenter

# n characters   H, W crop   h, w flat word

AROUND = 1.0  # pixels that a mask may reach over its box
LEAST_IOU = 0.35  # a glyph that fits worse is not used
FITS_BETTER = 0.05  # IoU with the glyphs by which the ink found first beats its second look
CASE_GAIN = 0.08  # the other case must fit this much better to be believed
Refine = Literal["box", "glyph", "colour"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """A character's mask in the crop, before it is placed in the picture."""

    segment: Segment
    mask_HW: Mask
    glyph_HW: Mask
    glyph_iou: float
    score: float
    flags: tuple[Flag, ...]


def cut_characters(
    view: WordView,
    segments: Sequence[Segment],
    segmenter: Segmenter,
    fonts: FontSet,
    *,
    refine: Refine = "colour",
    registered: bool = True,
) -> list[Cut]:
    """The masks of a word's characters, disjoint, in the order of the segments."""
    if not segments:
        return []
    boxes = [_inside(segment.box, view.size) for segment in segments]
    answer = segmenter.predict(view.embedding, [Prompt(box=box) for box in boxes])
    chosen = [
        replace(seen, mask_HW=clip_to(seen.mask_HW, box, grow=AROUND))
        for seen, box in zip(candidates(answer), boxes, strict=True)
    ]
    cuts = [
        _first_cut(view, *pair, fonts, registered) for pair in zip(segments, chosen, strict=True)
    ]
    if refine != "box":
        chosen = _with_glyphs(view, cuts, chosen, segmenter)
    masks = [candidate.mask_HW for candidate in chosen]
    if refine == "colour":
        masks, cuts = _with_colour(view, cuts, masks)
    masks = share_out(masks, [cut.glyph_HW for cut in cuts])
    return [
        replace(
            cut,
            mask_HW=mask_HW,
            score=character_score(trust.predicted_iou, trust.stability, cut.glyph_iou),
        )
        for cut, mask_HW, trust in zip(cuts, masks, chosen, strict=True)
    ]


def _first_cut(
    view: WordView, segment: Segment, seen: Candidate, fonts: FontSet, registered: bool
) -> Cut:
    """The box's mask with the glyph that fits it, as far as there is one."""
    target_HW = seen.mask_HW & view.ink_HW
    if not target_HW.any():
        target_HW = seen.mask_HW
    target_hw = view.rectangle.sample_mask(target_HW)
    found, flags = _fitting(view, segment, target_hw, fonts, registered)
    glyph_HW = np.zeros_like(target_HW)
    if found is not None:
        glyph_HW = view.rectangle.paint(found.paint(view.rectangle.size), view.size)
    return Cut(
        segment=segment,
        mask_HW=seen.mask_HW,
        glyph_HW=glyph_HW,
        glyph_iou=found.iou if found is not None else 0.0,
        score=0.0,
        flags=(*segment.flags, *flags),
    )


def _fitting(
    view: WordView, segment: Segment, target_hw: Mask, fonts: FontSet, registered: bool
) -> tuple[Registration | None, tuple[Flag, ...]]:
    """The glyph to use, in either case of the letter, and what is to be said about it."""
    fit = register if registered else unregistered
    templates = turned(fonts.templates(segment.cluster), view.rectangle.downward)
    if not templates:
        return None, ("no_glyph",)
    found = fit(templates, target_hw, segment.edges)
    other = segment.cluster.swapcase()
    flags: tuple[Flag, ...] = ()
    if len(other) == len(segment.cluster) and other != segment.cluster:
        swapped = turned(fonts.templates(other), view.rectangle.downward)
        rival = fit(swapped, target_hw, segment.edges)
        if rival is not None and rival.iou > (found.iou if found else 0.0) + CASE_GAIN:
            found, flags = rival, ("other_case",)
    if found is None or found.iou < LEAST_IOU:
        return None, ("glyph_mismatch",)
    return found, flags


def _with_glyphs(
    view: WordView, cuts: Sequence[Cut], seen: Sequence[Candidate], segmenter: Segmenter
) -> list[Candidate]:
    """Ask again with the points of every glyph that fits, and choose."""
    asked = [number for number, cut in enumerate(cuts) if cut.glyph_HW.any()]
    prompts = [
        glyph_prompt(cuts[number].glyph_HW, _frame(cuts[number].glyph_HW)) for number in asked
    ]
    answers = candidates(segmenter.predict(view.embedding, prompts)) if prompts else []
    chosen = list(seen)
    for number, prompt, answer in zip(asked, prompts, answers, strict=True):
        assert prompt.box is not None
        clipped = replace(answer, mask_HW=clip_to(answer.mask_HW, prompt.box, grow=AROUND))
        glyph_area = int(np.count_nonzero(cuts[number].glyph_HW))
        chosen[number] = choose(seen[number], clipped, glyph_area)
    return chosen


def _frame(glyph_HW: Mask) -> Mask:
    """The glyph's upright frame."""
    rows, columns = np.flatnonzero(glyph_HW.any(1)), np.flatnonzero(glyph_HW.any(0))
    frame_HW = np.zeros_like(glyph_HW)
    frame_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return frame_HW


def _with_colour(
    view: WordView, cuts: list[Cut], masks: list[Mask]
) -> tuple[list[Mask], list[Cut]]:
    """Every mask cut to the text's colour, where that colour stands out."""
    text_HW = np.logical_or.reduce(masks)
    near_HW = binary_dilation(text_HW | view.ink_HW, iterations=2)
    text_ink_HW = view.ink_HW & text_HW
    clear = separation(view.lab_HW3, text_ink_HW, view.inside_HW & ~near_HW) >= SEPARATE
    if not clear:
        return masks, [replace(cut, flags=(*cut.flags, "no_colour_step")) for cut in cuts]
    again_HW = text_colour_ink(view.lab_HW3, view.inside_HW, view.colour.mask_HW, text_ink_HW)
    glyphs_HW = np.logical_or.reduce([cut.glyph_HW for cut in cuts])
    gain = mask_iou(view.ink_HW, glyphs_HW) - mask_iou(again_HW, glyphs_HW)
    ink_HW = view.ink_HW if gain > FITS_BETTER else again_HW
    coloured: list[Mask] = []
    for number, mask_HW in enumerate(masks):
        stroke_HW = stroke_mask(mask_HW, cuts[number].glyph_HW, ink_HW)
        coloured.append(mask_HW if stroke_HW is None else stroke_HW)
        if stroke_HW is None:
            cuts[number] = replace(cuts[number], flags=(*cuts[number].flags, "no_colour_step"))
    return coloured, cuts


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """The box inside the crop, at least a pixel wide and high."""
    height, width = size
    x0, y0 = min(max(box[0], 0.0), width - 1.0), min(max(box[1], 0.0), height - 1.0)
    return x0, y0, max(min(box[2], float(width)), x0 + 1), max(min(box[3], float(height)), y0 + 1)
