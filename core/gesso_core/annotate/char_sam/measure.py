"""Every way to make masks, side by side: prompts, boxes, with and without glyphs and colour.

A word is embedded once for all of them, and a prompt that two methods share is asked once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gesso_core.annotate.char_sam.characters import Refine, cut_characters
from gesso_core.annotate.char_sam.glyphs import FontSet
from gesso_core.annotate.char_sam.graphemes import graphemes
from gesso_core.annotate.char_sam.ink import joint_ink
from gesso_core.annotate.char_sam.ocr import TextReader
from gesso_core.annotate.char_sam.refine_boxes import (
    Segment,
    even_boxes,
    refine_boxes,
    segment_of_edges,
)
from gesso_core.annotate.char_sam.remembering import Remembering
from gesso_core.annotate.char_sam.scenes import Scene, TrueCharacter
from gesso_core.annotate.char_sam.settle import settle_ink
from gesso_core.annotate.char_sam.view import WordView, candidates, local_box, look
from gesso_core.annotate.char_sam.vote import vote
from gesso_core.annotate.char_sam.words import PlacedMask, hull_of
from gesso_core.annotate.kitti.boxes import iou_2d
from gesso_core.annotate.masks import Mask, Overlap, mask_iou, overlap, pooled
from gesso_core.annotate.segmenter.contract import Prompt, Segmenter

# H, W picture

Boxes = Literal["given", "true", "even", "refined", "reader", "polygon"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table; ``refine`` None means that the title says it all."""

    title: str
    boxes: Boxes
    refine: Refine | None = None
    registered: bool = True
    quick: bool = False


WORD = Method(title="word box, crop per word", boxes="given", quick=True)
WORD_FULL = Method(title="word box, full picture", boxes="given")
CHARACTER_FULL = Method(title="character box, full picture", boxes="true")
CHARACTER = Method(title="character box", boxes="refined", refine="box", quick=True)
GLYPH = Method(title="+ glyph, registered", boxes="refined", refine="glyph", quick=True)
COLOUR = Method(title="+ registered + stroke colour", boxes="refined", refine="colour", quick=True)
THRESHOLD = Method(title="colour threshold alone, no SAM", boxes="polygon", quick=True)
_LOOSE = "+ glyph, not registered"
METHODS = (
    WORD_FULL,
    WORD,
    CHARACTER_FULL,
    Method(title="character box", boxes="true", refine="box", quick=True),
    Method(title=_LOOSE, boxes="true", refine="glyph", registered=False),
    Method(title=_LOOSE, boxes="even", refine="glyph", registered=False),
    Method(title=_LOOSE, boxes="reader", refine="glyph", registered=False),
    CHARACTER,
    Method(title=_LOOSE, boxes="refined", refine="glyph", registered=False),
    GLYPH,
    Method(title="+ glyph, registered", boxes="even", refine="glyph"),
    COLOUR,
    Method(title=_LOOSE + " + colour", boxes="true", refine="colour", registered=False),
    THRESHOLD,
)
BOX_SOURCES = (
    "advance widths",
    "colour ink + cuts",
    "SAM ink + cuts",
    "both + cuts",
    "both, text colour + cuts",
    "reader's columns",
)


@dataclass
class Measured:
    """Pixels of each method, how well each kind of box fits, and how each word fared."""

    name: str
    overlaps: dict[Method, Overlap] = field(default_factory=dict)
    box_ious: dict[str, list[float]] = field(default_factory=dict)
    word_ious: list[tuple[str, str, float]] = field(default_factory=list)  # scene, text, default's
    words: int = 0
    characters: int = 0

    def iou(self, method: Method) -> float:
        """Foreground IoU, pooled over the pictures."""
        return self.overlaps[method].iou

    def boxes_found(self, source: str) -> float:
        """Share of characters whose box overlaps the true one by half."""
        return float(np.mean([iou >= 0.5 for iou in self.box_ious[source]]))


def measure(
    name: str,
    scenes: Iterable[Scene],
    segmenter: Segmenter,
    fonts: FontSet,
    *,
    methods: Sequence[Method] = METHODS,
    reader: TextReader | None = None,
    on_scene: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Run the methods on scenes. Those that need a reader or true boxes are left out without."""
    result = Measured(name)
    remembering = Remembering(segmenter)
    for scene in scenes:
        on_scene(scene.name)
        usable = [m for m in methods if _possible(m, scene, reader)]
        painted = {m: np.zeros(scene.values_HW.shape, dtype=bool) for m in usable}
        for number, word in enumerate(scene.words):
            view = look(scene.picture_HW3, word, remembering)
            view = settle_ink(view, graphemes(word.text), fonts)
            segments = _segments(view, scene.characters[number], fonts, reader)
            _add_boxes(result, view, scene.characters[number], fonts, segments)
            for method in usable:
                local_HW = _mask(view, method, segments, remembering, fonts)
                if local_HW is None:
                    continue
                word_mask = PlacedMask(*view.origin, local_HW)
                word_mask.add_to(painted[method])
                if method == COLOUR:
                    iou = mask_iou(word_mask.paint(scene.values_HW.shape), scene.truth(number))
                    result.word_ious.append((scene.name, word.text, iou))
            result.words += 1
            result.characters += len(segments["refined"])
        _add_full(painted, scene, remembering)
        truth_HW = np.logical_or.reduce([scene.truth(n) for n in range(len(scene.words))])
        for method in usable:
            counted = [result.overlaps.get(method, Overlap()), overlap(painted[method], truth_HW)]
            result.overlaps[method] = pooled(counted)
    return result


def _possible(method: Method, scene: Scene, reader: TextReader | None) -> bool:
    if method.boxes == "true":
        return all(scene.characters)
    return method.boxes != "reader" or reader is not None


def _segments(
    view: WordView,
    truth: Sequence[TrueCharacter],
    fonts: FontSet,
    reader: TextReader | None,
) -> dict[Boxes, list[Segment]]:
    clusters = graphemes(view.annotation.text)
    flat_hw = view.rectangle.sample_mask(view.ink_HW)
    said = vote(view, clusters, reader) if reader else None
    found: dict[Boxes, list[Segment]] = {
        "even": even_boxes(view.rectangle, clusters, fonts),
        "refined": refine_boxes(
            view.rectangle,
            flat_hw,
            clusters,
            fonts,
            vote_n=said.borders_n if said else None,
        ),
        "reader": [],
        "true": [_true_segment(view, character, place) for place, character in enumerate(truth)],
    }
    if said is not None and said.spans_n2 is not None:
        top = float(view.rectangle.margin)
        bottom = view.rectangle.size[0] - top
        found["reader"] = [
            segment_of_edges(view.rectangle, cluster, place, (u0, top, max(u1, u0 + 1), bottom))
            for place, (cluster, (u0, u1)) in enumerate(
                zip(clusters, said.spans_n2.tolist(), strict=True)
            )
        ]
    return found


def _true_segment(view: WordView, character: TrueCharacter, place: int) -> Segment:
    x0, y0, x1, y1 = local_box(character.box, view.origin)
    corners = view.rectangle.from_picture(np.array([x0, x1, x1, x0]), np.array([y0, y0, y1, y1]))
    return Segment(
        cluster=character.char,
        index=place,
        edges=hull_of(corners),
        quad=((x0, y0), (x1, y0), (x1, y1), (x0, y1)),
        box=(x0, y0, x1, y1),
        flags=(),
    )


def _mask(
    view: WordView,
    method: Method,
    segments: dict[Boxes, list[Segment]],
    segmenter: Segmenter,
    fonts: FontSet,
) -> Mask | None:
    """The word's mask in its crop; None where the method works on the full picture."""
    if method == WORD:
        return view.word.mask_HW
    if method == THRESHOLD:
        return view.colour.mask_HW
    if method.refine is None or not segments[method.boxes]:
        return None
    cuts = cut_characters(
        view,
        segments[method.boxes],
        segmenter,
        fonts,
        refine=method.refine,
        registered=method.registered,
    )
    mask_HW: Mask = np.logical_or.reduce([cut.mask_HW for cut in cuts])
    return mask_HW


def _add_full(painted: dict[Method, Mask], scene: Scene, segmenter: Segmenter) -> None:
    """The methods that embed the whole picture."""
    wanted = [method for method in (WORD_FULL, CHARACTER_FULL) if method in painted]
    if not wanted:
        return
    embedding = segmenter.embed(scene.picture_HW3)
    for method in wanted:
        boxes = [word.hull for word in scene.words]
        if method == CHARACTER_FULL:
            boxes = [character.box for word in scene.characters for character in word]
        answer = segmenter.predict(embedding, [Prompt(box=box) for box in boxes])
        for seen in candidates(answer):
            painted[method] |= seen.mask_HW


def _add_boxes(
    result: Measured,
    view: WordView,
    truth: Sequence[TrueCharacter],
    fonts: FontSet,
    segments: dict[Boxes, list[Segment]],
) -> None:
    """IoU of each kind of box with the true one."""
    if not truth:
        return
    clusters = graphemes(view.annotation.text)
    colour_HW, word_HW = view.colour.mask_HW, view.word.mask_HW & view.inside_HW

    def cut(ink_HW: Mask) -> list[Segment]:
        flat_hw = view.rectangle.sample_mask(ink_HW)
        return refine_boxes(view.rectangle, flat_hw, clusters, fonts)

    found = (
        segments["even"],
        cut(colour_HW),
        cut(word_HW),
        cut(joint_ink(colour_HW, word_HW)),
        segments["refined"],
        segments["reader"],
    )
    for source, boxes in zip(BOX_SOURCES, found, strict=True):
        found_at = {segment.index: segment.box for segment in boxes}
        result.box_ious.setdefault(source, []).extend(
            float(iou_2d(found_at[place], local_box(character.box, view.origin))[0, 0])
            if place in found_at
            else 0.0
            for place, character in enumerate(truth)
        )
