"""Pictures of characters: templates from a handful of fonts of different build.

The fonts beside this package (SIL Open Font License, texts next to them) cover Latin, Greek,
Cyrillic and Hebrew; a folder of the user's fonts adds other scripts. A character that a font lacks
has no template there: the box that fonts draw instead is never taken for a glyph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gesso_core.annotate.char_sam.graphemes import is_extender, visible
from gesso_core.annotate.masks import Mask, box_of_mask
from gesso_core.errors import InvalidRequest

PIXELS = 128
REMEMBERED = 2048  # characters whose pictures are kept
SUFFIXES = (".ttf", ".otf", ".ttc", ".woff", ".woff2")
SHIPPED = Path(str(files("gesso_core.annotate") / "fonts"))
# Sans regular and bold, a bold serif, a bold condensed. A face is its files: one per script.
TEMPLATE_FACES = (
    ("open-sans", "400-normal"),
    ("open-sans", "700-normal"),
    ("noto-serif", "700-normal"),
    ("roboto-condensed", "700-normal"),
)
_NEVER_A_CHARACTER = "\uffff"


@dataclass(frozen=True)
class Template:
    """A character's ink in one font, cropped: (h, w), and the font's name."""

    font: str
    ink_hw: Mask


class Face:
    """One font, possibly spread over files that cover one script each."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self.paths = tuple(paths)

    def font_of(self, cluster: str) -> ImageFont.FreeTypeFont | None:
        """The first file that has every character of the cluster."""
        for font, missing in self._fonts:
            if all(
                is_extender(character) or _raster(font, character) not in (missing, b"")
                for character in cluster
            ):
                return font
        return None

    @cached_property
    def _fonts(self) -> list[tuple[ImageFont.FreeTypeFont, bytes]]:
        opened = [_open(path) for path in self.paths]
        return [(font, _raster(font, _NEVER_A_CHARACTER)) for font in opened]


class FontSet:
    """The fonts that templates are drawn with, most neutral first."""

    def __init__(self, faces: Sequence[Face]) -> None:
        self.faces = tuple(faces)
        self._remembered_templates = lru_cache(REMEMBERED)(self._draw_templates)
        self._remembered_advance = lru_cache(REMEMBERED)(self._measure_advance)

    def templates(self, cluster: str) -> tuple[Template, ...]:
        """One template per font that has the character; none when no font does."""
        return self._remembered_templates(visible(cluster))

    def advance(self, cluster: str) -> float:
        """Width of the character in the first font that has it, in em; 1 for unknown ones."""
        return self._remembered_advance(visible(cluster))

    def _draw_templates(self, cluster: str) -> tuple[Template, ...]:
        found = [(face.name, face.font_of(cluster)) for face in self.faces]
        drawn = [Template(name, _drawn(font, cluster)) for name, font in found if font]
        return tuple(t for t in drawn if t.ink_hw.size)

    def _measure_advance(self, cluster: str) -> float:
        if cluster.isspace():
            return 0.26
        for face in self.faces:
            font = face.font_of(cluster)
            if font is not None:
                return max(float(font.getlength(cluster)) / PIXELS, 0.1)
        return 1.0


def turned(templates: Sequence[Template], downward: bool) -> list[Template]:
    """Templates as characters lie in the flat word: on their left side when it runs downwards."""
    if not downward:
        return list(templates)
    return [replace(t, ink_hw=np.ascontiguousarray(np.rot90(t.ink_hw))) for t in templates]


@lru_cache(maxsize=8)
def font_set(folder: Path | None = None) -> FontSet:
    """The shipped fonts, and behind them those of the user's folder.

    Raises InvalidRequest when the folder is missing or holds no font.
    """
    shipped = [
        Face(f"{family} {build}", sorted((SHIPPED / "templates").glob(f"{family}-*-{build}.woff2")))
        for family, build in TEMPLATE_FACES
    ]
    return FontSet([*shipped, *(user_faces(folder) if folder is not None else [])])


def user_faces(folder: Path) -> list[Face]:
    """Every font file of a folder as a face of its own."""
    if not folder.is_dir():
        raise InvalidRequest(f"the font folder {folder} does not exist", field="fonts")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InvalidRequest(
            f"the folder {folder} holds no font; expected {', '.join(SUFFIXES)}", field="fonts"
        )
    for path in paths:
        _open(path)
    return [Face(path.stem, [path]) for path in paths]


def _open(path: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(path), PIXELS)
    except OSError as error:
        raise InvalidRequest(
            f"{path} is not a font that can be read: {error}", field="fonts"
        ) from error


def _raster(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The pixels of a character, size included, to compare it with the missing glyph."""
    ink_hw = _drawn(font, character)
    return bytes(f"{ink_hw.shape}", "ascii") + ink_hw.tobytes() if ink_hw.size else b""


def _drawn(font: ImageFont.FreeTypeFont, text: str) -> Mask:
    x0, y0, x1, y1 = (round(edge) for edge in font.getbbox(text))
    canvas = Image.new("L", (max(x1 - x0, 1) + 8, max(y1 - y0, 1) + 8))
    ImageDraw.Draw(canvas).text((4 - x0, 4 - y0), text, fill=255, font=font)
    ink_HW: Mask = np.asarray(canvas) >= 128
    left, top, right, bottom = box_of_mask(ink_HW)
    return np.ascontiguousarray(ink_HW[top:bottom, left:right])
