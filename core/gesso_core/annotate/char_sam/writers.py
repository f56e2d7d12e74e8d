"""Results as data sets: COCO instances, YOLO-seg, an indexed PNG, a TextSeg-like folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso_core.annotate.char_sam.outlines import single_outline
from gesso_core.annotate.char_sam.window_runs import encode_placed
from gesso_core.annotate.char_sam.words import (
    CharacterMask,
    PictureResult,
    PlacedMask,
    WordResult,
    placed_polygon,
)
from gesso_core.annotate.masks import box_of_mask
from gesso_core.pipelines.pictures import Pixels, encode_picture
from gesso_core.safe_files import inside

# H, W picture

CATEGORIES = ({"id": 1, "name": "character"}, {"id": 2, "name": "word"})
# What the fields are called in TextSeg's files, as far as remembered: all names in one place.
TEXTSEG_FIELDS = {
    "text": "text",
    "polygon": "bbox",
    "characters": "char",
    "box": "bbox",
    "value": "mask_value",
}


@dataclass
class CocoDataset:
    """A COCO instance file in the making: one annotation per character and one per word."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file_name: str, result: PictureResult, *, refused: bool = False) -> None:
        """Add a picture. ``refused`` also takes the masks that should not train anything."""
        height, width = result.size
        image_id = len(self.images) + 1
        self.images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        for word_id, word in enumerate(result.words):
            if word.annotation.ignore:
                self._append(
                    image_id, 2, ignored_area(word, result.size), result.size, word, word_id
                )
                continue
            for character in word.characters:
                if refused or character.refused is None:
                    self._append(image_id, 1, character.mask, result.size, character, word_id)
            if refused or word.refused is None:
                self._append(image_id, 2, word.mask, result.size, word, word_id)

    def to_json(self) -> dict[str, Any]:
        """The whole file."""
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [dict(category) for category in CATEGORIES],
        }

    def _append(
        self,
        image_id: int,
        category: int,
        mask: PlacedMask,
        size: tuple[int, int],
        labelled: CharacterMask | WordResult,
        word_id: int,
    ) -> None:
        x0, y0, x1, y1 = box_of_mask(mask.window_hw)
        attributes: dict[str, Any] = {"word_id": word_id, "flags": list(labelled.flags)}
        if isinstance(labelled, CharacterMask):
            attributes |= {"char": labelled.char, "index": labelled.index}
        else:
            attributes |= {
                "text": labelled.annotation.text,
                "transcription_source": labelled.annotation.source,
            }
        if labelled.refused is not None:
            attributes["refused"] = labelled.refused
        ignored = isinstance(labelled, WordResult) and labelled.annotation.ignore
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": category,
                "segmentation": encode_placed(mask, size),
                "area": mask.area,
                "bbox": [mask.x + x0, mask.y + y0, x1 - x0, y1 - y0],
                "iscrowd": int(ignored),
                "score": round(labelled.score, 4),
                "attributes": attributes,
            }
        )


def ignored_area(word: WordResult, size: tuple[int, int]) -> PlacedMask:
    """The polygon of an ignored word as a mask; COCO leaves crowd regions out of its metrics."""
    return placed_polygon(word.annotation.polygon, size)


def yolo_lines(
    result: PictureResult, classes: Sequence[str], *, tolerance: float = 0.0
) -> list[str]:
    """YOLO-seg: ``class x y x y ...`` per character, coordinates as shares of the picture.

    A character is one polygon: its parts and holes are joined by bridges. Characters that are not
    among the classes, and refused ones, are left out.
    """
    height, width = result.size
    lines = []
    for character in (c for word in result.words for c in word.characters):
        if character.refused is not None or character.char not in classes:
            continue
        outline = single_outline(character.mask, tolerance=tolerance)
        if outline:
            numbers = " ".join(f"{x / width:.6f} {y / height:.6f}" for x, y in outline)
            lines.append(f"{classes.index(character.char)} {numbers}")
    return lines


def yolo_classes(results: Sequence[PictureResult]) -> list[str]:
    """The characters that occur, sorted: the ``names`` of a YOLO data set."""
    return sorted({c.char for result in results for word in result.words for c in word.characters})


def yolo_yaml(classes: Sequence[str]) -> str:
    """The ``data.yaml`` of a YOLO data set whose pictures lie in ``images`` beside it."""
    names = "".join(f"  {number}: {_yaml_text(name)}\n" for number, name in enumerate(classes))
    return f"path: .\ntrain: images\nval: images\nnames:\n{names}"


def indexed_mask(result: PictureResult) -> NDArray[np.uint16]:
    """Value k is the k-th character of the picture, counted from 1 through all words, (H, W)."""
    values_HW = np.zeros(result.size, dtype=np.uint16)
    characters = [c for word in result.words for c in word.characters]
    for value, character in enumerate(characters, start=1):
        values_HW[character.mask.place][character.mask.window_hw] = value
    return values_HW


def indexed_png(result: PictureResult) -> bytes:
    """`indexed_mask` as a PNG."""
    return values_png(indexed_mask(result))


def values_png(values_HW: NDArray[np.uint16]) -> bytes:
    """An index mask as a PNG: 8 bit gray, 16 bit from 256 values on."""
    small = int(values_HW.max()) < 256
    file = BytesIO()
    Image.fromarray(values_HW.astype(np.uint8) if small else values_HW).save(file, "PNG")
    return file.getvalue()


def textseg_json(result: PictureResult) -> list[dict[str, Any]]:
    """The file beside the mask: words, their polygons, and each character's box and value."""
    names, value, entries = TEXTSEG_FIELDS, 0, []
    for word in result.words:
        characters = []
        for character in word.characters:
            value += 1
            characters.append(
                {
                    names["text"]: character.char,
                    names["box"]: [round(edge, 2) for edge in character.box],
                    names["value"]: value,
                    "score": round(character.score, 4),
                    "flags": list(character.flags),
                    "refused": character.refused,
                }
            )
        entries.append(
            {
                names["text"]: word.annotation.text,
                names["polygon"]: [list(point) for point in word.annotation.polygon],
                names["characters"]: characters,
                "ignore": word.annotation.ignore,
                "transcription_source": word.annotation.source,
                "score": round(word.score, 4),
                "refused": word.refused,
            }
        )
    return entries


def textseg_files(name: str, picture_HW3: Pixels, result: PictureResult) -> dict[str, bytes]:
    """One picture of a TextSeg-like folder: image/, annotation/ (JSON) and mask/ (PNG)."""
    entries = json.dumps(textseg_json(result), ensure_ascii=False, indent=1)
    return {
        f"annotation/{name}.json": entries.encode(),
        f"image/{name}.png": encode_picture(picture_HW3),
        f"mask/{name}.png": indexed_png(result),
    }


def write_textseg(folder: Path, name: str, picture_HW3: Pixels, result: PictureResult) -> None:
    """`textseg_files` in a folder; raises UnsafeFile for a name that leads out of it."""
    inside(folder, name)
    for place, content in textseg_files(name, picture_HW3, result).items():
        path = inside(folder, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _yaml_text(text: str) -> str:
    """A quoted text of YAML. Its escapes are not those of JSON, which halves an emoji."""
    return '"' + "".join(map(_yaml_character, text)) + '"'


def _yaml_character(character: str) -> str:
    plain = character.isprintable() and character not in '"\\'
    return character if plain else f"\\U{ord(character):08x}"
