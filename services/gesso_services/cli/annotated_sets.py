"""An annotated folder as one data set: COCO, YOLO, TextSeg or Label Studio, a picture at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gesso_contracts import TextLabels, parse
from gesso_core.annotate.char_sam import label_studio
from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.char_sam.writers import (
    CATEGORIES,
    CocoDataset,
    write_textseg,
    yolo_lines,
)
from gesso_core.annotate.pictures import open_picture

from gesso_services.annotation_labels import picture_result
from gesso_services.cli.annotated_folder import SetFormat, done, write
from gesso_services.client_wire import Json

COCO: Final = "coco.json"
LABEL_STUDIO: Final = "label-studio.json"


def write_set(out: Path, pictures: Path, wanted: SetFormat) -> Path:
    """Write everything that is done in ``out`` as one data set, and return where it is.

    Args:
        pictures: the folder that the names of the pictures are relative to.
    """
    writers = {
        "coco": _coco,
        "yolo": _yolo,
        "textseg": _textseg,
        "label-studio": _label_studio,
    }
    return writers[wanted](out, pictures)


def flat(name: str) -> str:
    """A name without folders and ending, for formats that have one folder for all pictures."""
    return "__".join(Path(name).with_suffix("").parts)


def _coco(out: Path, pictures: Path) -> Path:
    """Images first, as the manifest knows them, then the annotations, picture by picture."""
    target = out / COCO
    with target.open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        images = (
            {
                "id": number,
                "file_name": line["name"],
                "height": line["height"],
                "width": line["width"],
            }
            for number, line in enumerate(_done(out), start=1)
        )
        _write_list(file, images)
        file.write('], "annotations": [')
        _write_list(file, _coco_annotations(out))
        file.write(f'], "categories": {json.dumps(CATEGORIES)}}}\n')
    return target


def _coco_annotations(out: Path) -> Iterator[Json]:
    number = 0
    for image, line in enumerate(_done(out), start=1):
        one = CocoDataset()
        one.add(line["name"], _result(out, line["name"]))
        for annotation in one.annotations:
            number += 1
            yield annotation | {"id": number, "image_id": image}


def _yolo(out: Path, pictures: Path) -> Path:
    """Pictures and label files side by side; the classes are all characters that occur."""
    root = out / "yolo"
    classes = sorted({character for line in _done(out) for character in line["characters"]})
    for line in _done(out):
        name = line["name"]
        lines = yolo_lines(_result(out, name), classes)
        text = "".join(f"{one}\n" for one in lines)
        write(root / "labels" / f"{flat(name)}.txt", text.encode())
        picture = root / "images" / f"{flat(name)}{Path(name).suffix}"
        write(picture, (pictures / name).read_bytes())
    names = "".join(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(classes))
    text = f"path: .\ntrain: images\nval: images\nnames:\n{names}"
    write(root / "data.yaml", text.encode())
    return root


def _textseg(out: Path, pictures: Path) -> Path:
    root = out / "textseg"
    for line in _done(out):
        name = line["name"]
        write_textseg(root, flat(name), open_picture(pictures / name), _result(out, name))
    return root


def _label_studio(out: Path, pictures: Path) -> Path:
    """Tasks whose pictures go by their names: put them where your Label Studio serves files."""
    target = out / LABEL_STUDIO
    with target.open("w", encoding="utf-8") as file:
        file.write("[")
        names = (line["name"] for line in _done(out))
        _write_list(file, (label_studio.task(name, _result(out, name)) for name in names))
        file.write("]\n")
    return target


def _done(out: Path) -> Iterator[Json]:
    """The lines of pictures with words; a folder may have cars in it, too."""
    return (line for line in done(out) if "characters" in line)


def _result(out: Path, name: str) -> PictureResult:
    data = (out / "labels" / f"{name}.json").read_bytes()
    return picture_result(parse(data, TextLabels))


def _write_list(file: Any, values: Iterator[Json]) -> None:
    for place, value in enumerate(values):
        file.write(("," if place else "") + "\n" + json.dumps(value, ensure_ascii=False))
