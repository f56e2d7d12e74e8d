"""Char-SAM from picture to result: words in, masks of their characters out.

    annotator = CharSam(load_segmenter("sam-mobile"))
    result = annotator.annotate(picture, words)

A word costs one embedding and 1 + 2 n decoder calls for n characters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gesso_core.annotate.char_sam.characters import Refine, cut_characters
from gesso_core.annotate.char_sam.glyphs import FontSet, font_set
from gesso_core.annotate.char_sam.graphemes import graphemes
from gesso_core.annotate.char_sam.judge import judged, word_flags, word_result
from gesso_core.annotate.char_sam.ocr import TextReader
from gesso_core.annotate.char_sam.reading import reading_of
from gesso_core.annotate.char_sam.rectify import flat_size
from gesso_core.annotate.char_sam.refine_boxes import Segment, even_boxes, refine_boxes
from gesso_core.annotate.char_sam.remembering import Counted
from gesso_core.annotate.char_sam.settle import settle_ink
from gesso_core.annotate.char_sam.shrinking import shrunk
from gesso_core.annotate.char_sam.view import WordView, look
from gesso_core.annotate.char_sam.vote import vote
from gesso_core.annotate.char_sam.words import (
    Flag,
    PictureResult,
    PlacedMask,
    WordAnnotation,
    WordResult,
    check_word,
    is_usable,
)
from gesso_core.annotate.segmenter.contract import Segmenter, check_picture
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels

# H, W crop

LEAST_WIDTH = 2.0  # pixels per character, below which a text cannot stand in its polygon


@dataclass(frozen=True, kw_only=True)
class CharSamOptions:
    """How masks are made.

    Attributes:
        refine: "box" stops at the box's mask, "glyph" is the paper's method, "colour" adds the
            stroke colour step.
        boxes: "refined" by CBR, or "even" by advance widths alone, for comparison.
        registered: fit glyphs before use; off only for comparison.
        vote: let the reader's alignment pull the cuts, where there is a reader.
        min_score: characters below it are refused: a person should look at them.
    """

    refine: Refine = "colour"
    boxes: Literal["refined", "even"] = "refined"
    registered: bool = True
    vote: bool = True
    min_score: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise InvalidRequest(
                f"min_score is {self.min_score}; scores lie between 0 and 1", field="min_score"
            )


class CharSam:
    """The whole method on one segmenter.

    Args:
        fonts: a folder of further fonts, for scripts that the shipped ones lack.
        reader: finds words where none are given, and votes on the cuts.
    """

    def __init__(
        self, segmenter: Segmenter, *, fonts: Path | None = None, reader: TextReader | None = None
    ) -> None:
        self.segmenter = segmenter
        self.fonts: FontSet = font_set(fonts)
        self.reader = reader

    def annotate(
        self,
        picture_HW3: Pixels,
        words: Sequence[WordAnnotation] | None = None,
        options: CharSamOptions | None = None,
    ) -> PictureResult:
        """Masks for every character of the words; without words, of those that the reader finds.

        Raises InvalidRequest, naming the field, for a picture or a polygon that cannot be used.
        A word that is merely hard comes back refused, with the reason.
        """
        check_picture(picture_HW3)
        options = options or CharSamOptions()
        if words is None:
            words = self._found(picture_HW3)
        size = (picture_HW3.shape[0], picture_HW3.shape[1])
        for number, word in enumerate(words):
            check_word(word, size, name=f"words[{number}]")
        counted = Counted(self.segmenter)
        results = [self._word(picture_HW3, word, options, counted) for word in words]
        return PictureResult(
            size=size,
            words=tuple(results),
            segmenter=self.segmenter.name,
            decoder_calls=counted.prompts,
        )

    def _found(self, picture_HW3: Pixels) -> list[WordAnnotation]:
        if self.reader is None:
            raise InvalidRequest(
                "no words were given and there is no reader to find them; "
                "send words with polygon and text",
                field="words",
            )
        size = (picture_HW3.shape[0], picture_HW3.shape[1])
        return [word for word in self.reader.find(picture_HW3) if is_usable(word, size)]

    def _word(
        self,
        picture_HW3: Pixels,
        word: WordAnnotation,
        options: CharSamOptions,
        segmenter: Segmenter,
    ) -> WordResult:
        begun = time.perf_counter()
        clusters = graphemes(word.text)
        reason = None if word.ignore else _does_not_fit(word, clusters)
        if word.ignore or reason:
            return WordResult(annotation=word, mask=_nothing(), refused=reason)
        smaller = shrunk(picture_HW3, word, len(clusters))
        if smaller is not None:
            result = self._word(smaller.picture_HW3, smaller.word, options, segmenter)
            return replace(smaller.grown(result), seconds=time.perf_counter() - begun)
        view = settle_ink(look(picture_HW3, word, segmenter), clusters, self.fonts)
        segments, flags = self._segments(view, clusters, options)
        cuts = cut_characters(
            view,
            segments,
            segmenter,
            self.fonts,
            refine=options.refine,
            registered=options.registered,
        )
        cuts.sort(key=lambda cut: cut.segment.index)
        size = (picture_HW3.shape[0], picture_HW3.shape[1])
        flags = (*word_flags(view, size), *flags)
        characters = tuple(judged(cut, view, options.min_score) for cut in cuts)
        return word_result(view, characters, flags, time.perf_counter() - begun)

    def _segments(
        self, view: WordView, clusters: list[str], options: CharSamOptions
    ) -> tuple[list[Segment], tuple[Flag, ...]]:
        """One segment per character, and what the reader says about the text's length."""
        if options.boxes == "even":
            return even_boxes(view.rectangle, clusters, self.fonts), ()
        said = vote(view, clusters, self.reader) if self.reader and options.vote else None
        segments = refine_boxes(
            view.rectangle,
            view.rectangle.sample_mask(view.ink_HW),
            clusters,
            self.fonts,
            vote_n=said.borders_n if said else None,
        )
        return segments, ("length_mismatch",) if said and said.other_length else ()


def _does_not_fit(word: WordAnnotation, clusters: list[str]) -> str | None:
    x0, y0, x1, y1 = word.hull
    (_, columns), scale = flat_size(reading_of(word))
    long = max(x1 - x0, y1 - y0) if len(word.polygon) == 4 else columns / scale
    if long < LEAST_WIDTH * len(clusters) or columns < len(clusters):
        return (
            f"text does not fit: {len(clusters)} characters in a polygon of "
            f"{x1 - x0:.0f}x{y1 - y0:.0f} pixels"
        )
    return None


def _nothing() -> PlacedMask:
    return PlacedMask(0, 0, np.zeros((0, 0), dtype=bool))
