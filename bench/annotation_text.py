"""Char-SAM: what a word of six letters costs, and what each further step buys, beside a plain
colour threshold without a segmenter.

Words come from made scenes; each is looked at anew by every way, in turn. ``fg_iou`` pools the
pixels of all words against their exact ink.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from cpu_timing import Row
from gesso_core.annotate.char_sam.characters import Refine
from gesso_core.annotate.char_sam.ink import colour_ink, to_lab
from gesso_core.annotate.char_sam.pipeline import CharSam, CharSamOptions
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.char_sam.words import PlacedMask, WordAnnotation, polygon_mask
from gesso_core.annotate.masks import Mask, Overlap, overlap
from gesso_core.annotate.segmenter.crops import window_around
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.pipelines.pictures import Pixels

# H, W picture

LETTERS, WORDS = 6, 8
FIRST_SEED = 1000
SECONDS, CALLS = 10.0, 25  # a word of six letters takes less
REFINED: tuple[Refine, ...] = ("box", "glyph", "colour")


@dataclass(frozen=True)
class Word:
    """A word in its picture, and its exact ink."""

    picture_HW3: Pixels
    given: WordAnnotation
    truth_HW: Mask


Run = Callable[[Word], tuple[Mask, int]]  # the word's mask, and how often the decoder was asked


@dataclass
class Way:
    """What one way took for each word, and how well it did over all."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    found: Overlap = field(default_factory=Overlap)

    def row(self) -> Row:
        row = {
            "cpu_s": round(statistics.median(self.cpu_s), 4),
            "wall_s": round(statistics.median(self.wall_s), 4),
            "worst_wall_s": round(max(self.wall_s), 4),
            "fg_iou": round(self.found.iou, 4),
        }
        return row | ({"decoder_calls_at_most": max(self.calls)} if any(self.calls) else {})


def text_rows(*, smoke: bool) -> Iterator[Row]:
    annotator = CharSam(load_segmenter(threads=1))
    words = list(_words(1 if smoke else WORDS))
    runs: dict[str, Run] = {
        "colour threshold, no segmenter": _threshold,
        **{f"refined to {name}": partial(_annotated, annotator, name) for name in REFINED},
    }
    ways = {name: Way() for name in runs}
    for word in words[:1]:  # fonts are read, glyphs are drawn
        _annotated(annotator, "colour", word)
    for word in words:
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            mask_HW, calls = run(word)
            ways[name].cpu_s.append(time.process_time() - cpu)
            ways[name].wall_s.append(time.perf_counter() - wall)
            ways[name].calls.append(calls)
            ways[name].found += overlap(mask_HW, word.truth_HW)
    for name, way in ways.items():
        yield {"what": name, "letters": LETTERS, "words": len(words), **way.row()}
    ours = ways[f"refined to {REFINED[-1]}"]
    yield {
        "what": "a word of six letters by default settings, embedding included",
        "targets": {"worst_wall_s": SECONDS, "decoder_calls": CALLS},
        "met": max(ours.wall_s) < SECONDS and max(ours.calls) < CALLS,
        "threshold_fg_iou": round(ways["colour threshold, no segmenter"].found.iou, 4),
        "fg_iou": round(ours.found.iou, 4),
    }


def _words(count: int) -> Iterator[Word]:
    """Words of six letters, from one scene after the other."""
    seed, found = FIRST_SEED, 0
    while found < count:
        scene = make_scene(seed)
        seed += 1
        for number, word in enumerate(scene.words):
            if len(word.text) == LETTERS and found < count:
                found += 1
                yield Word(scene.picture_HW3, word, scene.truth(number))


def _annotated(annotator: CharSam, refine: Refine, word: Word) -> tuple[Mask, int]:
    options = CharSamOptions(refine=refine)
    result = annotator.annotate(word.picture_HW3, [word.given], options)
    return result.words[0].mask.paint(result.size), result.decoder_calls


def _threshold(word: Word) -> tuple[Mask, int]:
    """What differs from the colour around the word, inside its polygon."""
    size = word.truth_HW.shape
    x0, y0, x1, y1 = window_around(word.given.hull, (size[0], size[1]))
    outline = tuple((x - x0, y - y0) for x, y in word.given.polygon)
    inside_HW = polygon_mask(outline, (y1 - y0, x1 - x0))
    height = float(np.linalg.norm(np.subtract(word.given.polygon[0], word.given.polygon[-1])))
    ink = colour_ink(to_lab(word.picture_HW3[y0:y1, x0:x1]), inside_HW, height=height)
    return PlacedMask(x0, y0, ink.mask_HW).paint((size[0], size[1])), 0
