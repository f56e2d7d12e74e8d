"""One word, looked at: its crop embedded once, laid out flat, its ink found.

Everything below works in pixels of the crop. A word is embedded by itself, whatever the size of the
picture: characters are too small for the segmenter otherwise.
"""

from dataclasses import dataclass

import numpy as np

from gesso_core.annotate.char_sam.ink import (
    Ink,
    Lab,
    colour_ink,
    joint_ink,
    text_colour_ink,
    to_lab,
)
from gesso_core.annotate.char_sam.reading import Reading, reading_of
from gesso_core.annotate.char_sam.rectify import Rectangle, rectify
from gesso_core.annotate.char_sam.refine_glyphs import Candidate
from gesso_core.annotate.char_sam.words import WordAnnotation, polygon_mask
from gesso_core.annotate.geometry import Box, Point
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.segmenter.contract import Embedding, Masks, Prompt, Segmenter
from gesso_core.annotate.segmenter.crops import window_around
from gesso_core.pipelines.pictures import Pixels

# H, W the crop


@dataclass(frozen=True, kw_only=True, eq=False)
class WordView:
    """A word in its crop.

    Attributes:
        origin: (x, y) of the crop in the picture.
        lab_HW3: the crop in CIELAB.
        inside_HW: the word's polygon.
        colour: ink by colour alone.
        ink_HW: ink that colour and segmenter agree on, refined by the text's own colour.
        word: the segmenter's answer to the word's box.
    """

    annotation: WordAnnotation
    crop_HW3: Pixels
    lab_HW3: Lab
    origin: tuple[int, int]
    embedding: Embedding
    reading: Reading
    rectangle: Rectangle
    inside_HW: Mask
    colour: Ink
    ink_HW: Mask
    word: Candidate

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the crop."""
        return self.crop_HW3.shape[0], self.crop_HW3.shape[1]


def look(picture_HW3: Pixels, word: WordAnnotation, segmenter: Segmenter) -> WordView:
    """Crop, embed and flatten a word, and ask the segmenter for it once."""
    size = (picture_HW3.shape[0], picture_HW3.shape[1])
    x0, y0, x1, y1 = window_around(word.hull, size)
    crop_HW3 = np.ascontiguousarray(picture_HW3[y0:y1, x0:x1])
    reading = reading_of(word)
    rectangle = rectify(reading, origin=(x0, y0))
    outline = local_polygon(reading.top + reading.bottom[::-1], (x0, y0))
    inside_HW = polygon_mask(outline, (y1 - y0, x1 - x0))
    embedding = segmenter.embed(crop_HW3)
    answer = segmenter.predict(embedding, [Prompt(box=local_box(word.hull, (x0, y0)))])
    seen = candidates(answer)[0]
    height = (rectangle.size[0] - 2 * rectangle.margin) / rectangle.scale
    lab_HW3 = to_lab(crop_HW3)
    colour = colour_ink(lab_HW3, inside_HW, height=height)
    seed_HW = joint_ink(colour.mask_HW, seen.mask_HW)
    return WordView(
        annotation=word,
        crop_HW3=crop_HW3,
        lab_HW3=lab_HW3,
        origin=(x0, y0),
        embedding=embedding,
        reading=reading,
        rectangle=rectangle,
        inside_HW=inside_HW,
        colour=colour,
        ink_HW=text_colour_ink(lab_HW3, inside_HW, colour.mask_HW, seed_HW),
        word=seen,
    )


def local_box(box: Box, origin: tuple[int, int]) -> Box:
    """A box of the picture in the crop's pixels."""
    (x0, y0, x1, y1), (x, y) = box, origin
    return x0 - x, y0 - y, x1 - x, y1 - y


def local_polygon(polygon: tuple[Point, ...], origin: tuple[int, int]) -> tuple[Point, ...]:
    """A polygon of the picture in the crop's pixels."""
    return tuple((x - origin[0], y - origin[1]) for x, y in polygon)


def candidates(answer: Masks) -> list[Candidate]:
    """The segmenter's masks one by one."""
    return [
        Candidate(mask_HW, float(iou), float(stability))
        for mask_HW, iou, stability in zip(
            answer.masks_PHW, answer.predicted_iou_P, answer.stability_P, strict=True
        )
    ]
