"""Files for other tools: what the names and the characters of strangers become in them."""

import io
import zipfile

import numpy as np
import pytest
from gesso_core.annotate.char_sam.words import (
    CharacterMask,
    PictureResult,
    PlacedMask,
    WordAnnotation,
    WordResult,
)
from gesso_core.pipelines.pictures import blank_picture, encode_picture
from gesso_services.annotation_labels import text_labels
from gesso_services.gateway.exports import ExportFormat, Picture, text_file

SQUARE = ((2.0, 2.0), (8.0, 2.0), (8.0, 8.0), (2.0, 8.0))


def exported(char: str, name: str | None, wanted: ExportFormat) -> dict[str, bytes]:
    mask = PlacedMask(2, 2, np.ones((6, 6), dtype=bool))
    one = CharacterMask(
        char=char, index=0, box=(2, 2, 8, 8), quad=SQUARE, mask=mask, score=0.9, flags=()
    )
    annotation = WordAnnotation(text=char, polygon=SQUARE)
    word = WordResult(annotation=annotation, characters=(one,), mask=mask, score=0.9)
    labels = text_labels(PictureResult(size=(10, 12), words=(word,)))
    data = encode_picture(blank_picture(10, 12))
    file = text_file(labels, Picture.named(name, "text-1", data, "image/png"), wanted)
    with zipfile.ZipFile(io.BytesIO(file.data)) as packed:
        assert packed.testzip() is None
        return {name: packed.read(name) for name in packed.namelist()}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (None, "text-1.png"),
        ("image", "image.png"),
        ("scan.2024", "scan.2024.png"),
        ("A.JPEG", "A.JPEG"),
        ("ü" * 255, f"{'ü' * 255}.png"),
    ],
)
def test_a_picture_lies_beside_its_labels_under_a_name_that_tools_take_for_a_picture(
    name: str | None, kept: str
) -> None:
    files = exported("a", name, "yolo")
    stem = kept.rpartition(".")[0]
    assert set(files) == {"data.yaml", f"images/{kept}", f"labels/{stem}.txt"}


def test_the_longest_name_is_no_trouble_to_a_folder_of_textseg() -> None:
    stem = "ü" * 251
    files = exported("a", f"{stem}.png", "textseg")
    assert list(files) == [
        f"annotation/{stem}.json",
        f"image/{stem}.png",
        f"mask/{stem}.png",
    ]


@pytest.mark.parametrize("char", ["😀", "e\u0301", '"', "\\", "\x7f"])
def test_a_class_of_yolo_is_called_what_the_character_is(char: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(exported(char, "a.png", "yolo")["data.yaml"])["names"] == {0: char}
