"""Texts for a sign, set by a font: which font has their characters, and where each glyph goes.

Lengths are in em, the size of the font, so that the same layout fits a board of any size. Lines are
centred below one another; the characters of a line stand in visual order, left to right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from gesso_core.annotate.char_sam.glyphs import PIXELS, SHIPPED, Face, font_set
from gesso_core.annotate.char_sam.graphemes import graphemes, script_of, visible, visual_order
from gesso_core.annotate.geometry import Box
from gesso_core.errors import InvalidRequest

LINE = 1.2  # least distance of two baselines, em
GAP = 0.28  # between the ink of two lines, em
SPACE = 0.3  # width of a space, em
MARGIN = 0.06  # of a line's height, left between its ink and its polygon
SHOWN = 40  # characters of a text that a sentence repeats


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """A character in its place: pen position on the baseline and ink, em, y down."""

    char: str
    index: int
    font: ImageFont.FreeTypeFont
    pen: tuple[float, float]
    ink: Box


@dataclass(frozen=True, kw_only=True)
class Line:
    """One text of the sign; its glyphs are in logical order, without those of spaces."""

    text: str
    glyphs: tuple[Glyph, ...]

    @property
    def ink(self) -> Box:
        """The box around all ink."""
        return around([glyph.ink for glyph in self.glyphs])

    @property
    def frame(self) -> Box:
        """The box that the line is annotated with: a little more than its ink."""
        x0, y0, x1, y1 = self.ink
        margin = MARGIN * (y1 - y0)
        return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def lay_out(texts: Sequence[str], *, pick: float = 0.0, fonts: Path | None = None) -> list[Line]:
    """The lines of a sign, the middle of their ink at (0, 0).

    Args:
        pick: 0 to 1, which of the fonts that have a text's characters sets it.
        fonts: a folder of further fonts, for scripts that the shipped ones lack.

    Raises InvalidRequest, naming ``words.N``, for a text without visible characters, and for one
    with a character that no font has.
    """
    lines: list[Line] = []
    baseline = 0.0
    for number, text in enumerate(texts):
        able = _faces_for(text, _faces(fonts), f"words.{number}")
        line = _set(text, able[min(int(pick * len(able)), len(able) - 1)])
        x0, y0, x1, _ = line.ink
        if lines:
            baseline = max(baseline + LINE, lines[-1].ink[3] + GAP - y0)
        lines.append(_moved(line, -(x0 + x1) / 2, baseline))
    middle = sum(around([line.ink for line in lines])[1::2]) / 2
    return [_moved(line, 0.0, -middle) for line in lines]


def around(boxes: Sequence[Box]) -> Box:
    """The box around boxes."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def shown(text: str) -> str:
    """A text as a sentence repeats it."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")


@lru_cache(maxsize=8)
def _faces(folder: Path | None) -> tuple[tuple[Face, ...], ...]:
    """Fonts in groups, the preferred first: no glyph template is among those of the scenes, so
    that labels are not measured against the font that they were made with.
    """
    scenes = [Face(path.stem, [path]) for path in sorted((SHIPPED / "scenes").glob("*.woff2"))]
    return tuple(scenes), font_set(folder).faces


def _faces_for(text: str, groups: Sequence[Sequence[Face]], field: str) -> list[Face]:
    clusters = _inked(text)
    if not clusters:
        raise InvalidRequest(
            f"the text {shown(text)} has no character that can be seen; give a word", field=field
        )
    for group in groups:
        if able := [face for face in group if all(_font(face, one) for one in clusters)]:
            return able
    for cluster in clusters:
        if not any(_font(face, cluster) for group in groups for face in group):
            raise InvalidRequest(
                f"no font has {cluster!r} ({script_of(cluster)}), which {shown(text)} needs; give "
                "the annotation service a folder of fonts that have it (GESSO_ANNOTATION_FONTS), "
                "or another text",
                field=field,
            )
    raise InvalidRequest(
        f"no single font has all characters of {shown(text)}; split it into several words",
        field=field,
    )


@lru_cache(maxsize=4096)
def _font(face: Face, cluster: str) -> ImageFont.FreeTypeFont | None:
    """Remembered, because looking means drawing the character."""
    return face.font_of(cluster)


def _inked(text: str) -> list[str]:
    seen = (visible(cluster) for cluster in graphemes(text))
    return [cluster for cluster in seen if cluster.strip()]


def _set(text: str, face: Face) -> Line:
    """A line whose first pen position is (0, 0)."""
    clusters = [visible(cluster) for cluster in graphemes(text)]
    glyphs, pen = [], 0.0
    for index in visual_order(clusters):
        cluster = clusters[index]
        font = _font(face, cluster) if cluster.strip() else None
        if font is None:
            pen += SPACE if cluster else 0.0
            continue
        x0, y0, x1, y1 = (edge / PIXELS for edge in font.getbbox(cluster, anchor="ls"))
        ink = (pen + x0, y0, pen + x1, y1)
        glyphs.append(Glyph(char=cluster, index=index, font=font, pen=(pen, 0.0), ink=ink))
        pen += font.getlength(cluster) / PIXELS
    return Line(text=text, glyphs=tuple(sorted(glyphs, key=lambda glyph: glyph.index)))


def _moved(line: Line, x: float, y: float) -> Line:
    def moved(glyph: Glyph) -> Glyph:
        x0, y0, x1, y1 = glyph.ink
        pen = (glyph.pen[0] + x, glyph.pen[1] + y)
        return replace(glyph, pen=pen, ink=(x0 + x, y0 + y, x1 + x, y1 + y))

    return replace(line, glyphs=tuple(moved(glyph) for glyph in line.glyphs))
