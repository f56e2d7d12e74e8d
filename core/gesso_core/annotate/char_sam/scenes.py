"""Pictures whose characters are known pixel by pixel: what methods are measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso_core.annotate.char_sam.readers import load_json, read_words_json
from gesso_core.annotate.char_sam.words import WordAnnotation
from gesso_core.annotate.geometry import Box
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.pictures import open_picture
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels
from gesso_core.safe_files import inside

# H, W picture


@dataclass(frozen=True, kw_only=True, eq=False)
class TrueCharacter:
    """A character as it is: its tight box and its value in the scene's index mask."""

    char: str
    box: Box
    value: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A picture, its words, and the characters of each; ``values_HW`` is 0 for background.

    Where only words are known (photographs), the characters are empty and value k is word k.
    """

    name: str
    picture_HW3: Pixels
    words: tuple[WordAnnotation, ...]
    characters: tuple[tuple[TrueCharacter, ...], ...]
    values_HW: NDArray[np.uint16]

    def truth(self, number: int) -> Mask:
        """The ink of word ``number``, (H, W)."""
        values = [character.value for character in self.characters[number]] or [number + 1]
        mask_HW: Mask = np.isin(self.values_HW, values)
        return mask_HW


def load_scenes(folder: Path) -> list[Scene]:
    """Scenes of a folder: ``words.json`` with a ``char_mask`` and characters for each picture."""
    entries = load_json(folder / "words.json")
    annotated = read_words_json(entries)
    return [
        Scene(
            name=Path(entry["image"]).stem,
            picture_HW3=open_picture(inside(folder, entry["image"])),
            words=tuple(annotated[entry["image"]]),
            characters=tuple(_characters(word["chars"]) for word in entry["words"]),
            values_HW=_values(inside(folder, entry["char_mask"])),
        )
        for entry in entries
    ]


def load_photographs(folder: Path, *, script: str = "latin") -> list[Scene]:
    """Photographs with a reference mask per word; only words of the script that it covers."""
    entries = load_json(folder / "words.json")
    annotated = read_words_json(entries)
    scenes = []
    for entry in entries:
        if not entry.get("reference_mask"):
            continue
        values_HW = _values(inside(folder, entry["reference_mask"]))
        kept = [
            (number, word)
            for number, word in enumerate(annotated[entry["image"]], start=1)
            if word.script == script and (values_HW == number).any()
        ]
        numbers = {number: place for place, (number, _) in enumerate(kept, start=1)}
        scenes.append(
            Scene(
                name=Path(entry["image"]).stem,
                picture_HW3=open_picture(inside(folder, entry["image"])),
                words=tuple(word for _, word in kept),
                characters=tuple(() for _ in kept),
                values_HW=_renumbered(values_HW, numbers),
            )
        )
    return scenes


def _characters(entries: Sequence[Mapping[str, Any]]) -> tuple[TrueCharacter, ...]:
    return tuple(
        TrueCharacter(char=entry["char"], box=tuple(entry["bbox"]), value=int(entry["id"]))
        for entry in entries
    )


def _values(path: Path) -> NDArray[np.uint16]:
    if not path.is_file():
        raise InvalidRequest(f"{path} is missing; words.json names it", field=path.name)
    with Image.open(path) as image:
        return np.asarray(image).astype(np.uint16)


def _renumbered(values_HW: NDArray[np.uint16], numbers: Mapping[int, int]) -> NDArray[np.uint16]:
    table = np.zeros(int(values_HW.max()) + 1, dtype=np.uint16)
    for old, new in numbers.items():
        table[old] = new
    return table[values_HW]
