"""What goes in and what comes out: annotated words, the masks of their characters.

Polygons go clockwise (as seen, y down) from the corner where reading starts. Coordinates are pixels
of the picture, whole numbers on pixel edges.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import shapely
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from gesso_core.annotate.char_sam.graphemes import visible
from gesso_core.annotate.geometry import Box, Point, Polygon
from gesso_core.annotate.masks import Mask
from gesso_core.errors import InvalidRequest

# H, W picture   h, w window of it

TranscriptionSource = Literal["given", "ocr"]
Flag = Literal[
    "length_mismatch",  # the recogniser reads another number of characters
    "low_ink",  # hardly a pixel differs from the background
    "touching",  # the cut beside it runs through ink
    "clipped",  # the word reaches over the edge of the picture
    "no_glyph",  # no font has the character: the mask comes from the box alone
    "glyph_mismatch",  # the glyph does not fit what is seen: likewise
    "other_case",  # the picture shows the capital or the small letter instead
    "small",  # under 4 pixels in one direction
    "no_colour_step",  # text and background do not differ clearly in colour
    "start_moved",  # the polygon began at another corner than reading does
]
FLAGS: tuple[str, ...] = get_args(Flag)
_BAND_PIXELS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WordAnnotation:
    """A word as the data sets give it.

    Attributes:
        text: what it says, in logical order; spaces are allowed.
        polygon: 4 points or more; an even number beyond 4 runs along the top edge and back along
            the bottom edge.
        script: a name such as "latin", if known.
        ignore: unreadable (``###``): no masks, and its area counts in no metric.
        source, confidence: who read it, and how sure they were.
    """

    text: str
    polygon: Polygon
    script: str | None = None
    ignore: bool = False
    source: TranscriptionSource = "given"
    confidence: float = 1.0

    @property
    def hull(self) -> Box:
        """The upright box around the polygon."""
        return hull_of(self.polygon)


@dataclass(frozen=True, eq=False)
class PlacedMask:
    """A mask as a window of the picture: its left upper corner (x, y) and its pixels."""

    x: int
    y: int
    window_hw: Mask

    @property
    def area(self) -> int:
        """Foreground pixels."""
        return int(np.count_nonzero(self.window_hw))

    @property
    def place(self) -> tuple[slice, slice]:
        """The rows and columns of the picture that the window covers."""
        height, width = self.window_hw.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)

    def paint(self, size: tuple[int, int]) -> Mask:
        """The mask at the size (H, W) of the picture."""
        mask_HW = np.zeros(size, dtype=bool)
        self.add_to(mask_HW)
        return mask_HW

    def add_to(self, mask_HW: Mask) -> None:
        """Switch this mask's pixels on in a mask of the picture."""
        mask_HW[self.place] |= self.window_hw


@dataclass(frozen=True, kw_only=True, eq=False)
class CharacterMask:
    """One character of a word.

    Attributes:
        char: the character, a whole grapheme cluster.
        index: its place among the graphemes of the text, spaces counted.
        box: the upright box of CBR; ``quad`` the same along the reading direction.
        refused: why the mask should not train anything, None when it may.
    """

    char: str
    index: int
    box: Box
    quad: Polygon
    mask: PlacedMask
    score: float
    flags: tuple[Flag, ...] = ()
    refused: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class WordResult:
    """A word with its characters; ``refused`` tells why there is none, or why to look at it."""

    annotation: WordAnnotation
    characters: tuple[CharacterMask, ...] = ()
    mask: PlacedMask
    score: float = 0.0
    flags: tuple[Flag, ...] = ()
    refused: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureResult:
    """All words of a picture, in the order they were given."""

    size: tuple[int, int]
    words: tuple[WordResult, ...]
    segmenter: str = ""
    decoder_calls: int = 0

    def mask(self) -> Mask:
        """Every text pixel, (H, W)."""
        mask_HW = np.zeros(self.size, dtype=bool)
        for word in self.words:
            word.mask.add_to(mask_HW)
        return mask_HW

    def ignored(self) -> Mask:
        """The polygons of ignored words, (H, W)."""
        mask_HW = np.zeros(self.size, dtype=bool)
        for word in self.words:
            if word.annotation.ignore:
                placed_polygon(word.annotation.polygon, self.size).add_to(mask_HW)
        return mask_HW


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: words in, words labelled, how many were flagged or refused and why."""

    words: int
    labelled: int
    ignored: int
    flagged: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    seconds_per_word: float = 0.0


def summarize(results: Iterable[PictureResult]) -> Summary:
    """Count the outcome of a run. The reason of a refusal is its text up to the first colon."""
    words = [word for result in results for word in result.words]
    done = [word for word in words if not word.annotation.ignore]
    flags = Counter(flag for word in done for flag in word.flags)
    reasons = Counter(word.refused.partition(":")[0] for word in done if word.refused)
    return Summary(
        words=len(words),
        labelled=sum(word.refused is None for word in done),
        ignored=len(words) - len(done),
        flagged=dict(sorted(flags.items())),
        refused=dict(sorted(reasons.items())),
        seconds_per_word=sum(word.seconds for word in done) / max(len(done), 1),
    )


def check_word(word: WordAnnotation, size: tuple[int, int], *, name: str = "word") -> None:
    """Raise InvalidRequest, naming the field, for a polygon or text that cannot be used."""
    place = f"{name}.polygon"
    if len(word.polygon) < 4:
        raise InvalidRequest(
            f"the polygon has {len(word.polygon)} points; expected at least 4", field=place
        )
    if not all(math.isfinite(number) for point in word.polygon for number in point):
        raise InvalidRequest("the polygon has a coordinate that is not finite", field=place)
    x0, y0, x1, y1 = word.hull
    # Not the polygon's own area: that of corners given crosswise is 0.
    covered = shapely.MultiPoint(word.polygon).convex_hull.area
    if x1 - x0 < 2 or y1 - y0 < 2 or covered < 4:
        raise InvalidRequest(
            f"the polygon spans {x1 - x0:g}x{y1 - y0:g} pixels and covers {covered:g}; a word "
            "needs at least 2x2",
            field=place,
        )
    height, width = size
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InvalidRequest(
            f"the polygon lies outside the {width}x{height} picture; "
            "coordinates are pixels (x, y) of the upright picture",
            field=place,
        )
    if not word.ignore and not visible(word.text).strip():
        raise InvalidRequest(
            "the transcription is empty; give the text, or mark the word as ignored",
            field=f"{name}.text",
        )


def is_usable(word: WordAnnotation, size: tuple[int, int]) -> bool:
    """Whether `check_word` lets it pass: what a reader found may miss the picture."""
    try:
        check_word(word, size)
    except InvalidRequest:
        return False
    return True


def signed_area(polygon: Sequence[Point]) -> float:
    """Area of a simple polygon, positive when it goes clockwise as seen (y down)."""
    x, y = np.asarray(polygon, dtype=float).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def hull_of(points: Sequence[Point] | NDArray[np.float64]) -> Box:
    """The upright box around points."""
    array = np.asarray(points, dtype=float)
    (x0, y0), (x1, y1) = array.min(0), array.max(0)
    return float(x0), float(y0), float(x1), float(y1)


def placed_polygon(polygon: Sequence[Point], size: tuple[int, int]) -> PlacedMask:
    """`polygon_mask` as a window of a picture of (H, W), which is all that is looked at."""
    x0, y0, x1, y1 = hull_of(polygon)
    height, width = size
    left, right = (min(max(x, 0), width) for x in (math.floor(x0), math.ceil(x1)))
    top, bottom = (min(max(y, 0), height) for y in (math.floor(y0), math.ceil(y1)))
    moved = [(x - left, y - top) for x, y in polygon]
    return PlacedMask(left, top, polygon_mask(moved, (bottom - top, right - left)))


def polygon_mask(polygon: Sequence[Point], size: tuple[int, int]) -> Mask:
    """The pixels whose centres lie inside the polygon, (H, W)."""
    centres = np.asarray(polygon, dtype=float)[:, ::-1] - 0.5
    height, width = size
    mask_HW: Mask = np.zeros(size, dtype=bool)
    # In bands: scikit-image lists the coordinates of every pixel inside, 100 bytes each.
    band = max(_BAND_PIXELS // max(width, 1), 1)
    for top in range(0, height, band):
        rows = min(band, height - top)
        mask_HW[top : top + rows] = polygon2mask((rows, width), centres - (top, 0))
    return mask_HW
