"""An annotated folder as one data set, a picture at a time: words as COCO, YOLO, TextSeg or Label
Studio, cars as KITTI, nuScenes, OpenLABEL or SUSTechPOINTS.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO
from urllib.parse import quote

from gesso_contracts import CarLabels, TextLabels, parse
from gesso_core.annotate.char_sam import label_studio
from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.char_sam.writers import (
    CATEGORIES,
    CocoDataset,
    write_textseg,
    yolo_lines,
    yolo_yaml,
)
from gesso_core.annotate.kitti import writers
from gesso_core.annotate.pictures import open_picture
from gesso_core.errors import InvalidRequest

from gesso_services.annotation_labels import labelled_frame, picture_result
from gesso_services.cli.annotated_folder import CarFormat, SetFormat, done, write
from gesso_services.cli.common import complain, remark
from gesso_services.client_wire import Json

COCO: Final = "coco.json"
LABEL_STUDIO: Final = "label-studio.json"
LOCAL_FILES: Final = "/data/local-files/?d="  # how Label Studio calls what it serves from its disk
NUSCENES: Final = "nuscenes.json"


def write_set(out: Path, pictures: Path, wanted: SetFormat) -> Path:
    """Write everything that is done in ``out`` as one data set, and return where it is.

    A picture that has gone since it was labelled is named and left out.

    Args:
        pictures: the folder that the names of the pictures are relative to.
    """
    writers = {
        "coco": _coco,
        "yolo": _yolo,
        "textseg": _textseg,
        "label-studio": _label_studio,
    }
    return writers[wanted](out, pictures, list(_done(out, pictures)))


def write_car_set(out: Path, wanted: CarFormat) -> Path:
    """Write the cars of every frame that is done in ``out``, and return where they are.

    KITTI's files are there already. nuScenes gets one file, the others one per frame.
    """
    if wanted == "kitti":
        return out / "label_2"
    if wanted == "nuscenes":
        results = writers.nuscenes(_frames(out))
        write(out / NUSCENES, json.dumps(results).encode())
        return out / NUSCENES
    root = out / ("sustech/label" if wanted == "sustech" else "openlabel")
    one = writers.sustech if wanted == "sustech" else writers.openlabel
    for frame in _frames(out):
        write(root / f"{frame.stem}.json", json.dumps(one(frame)).encode())
    return root


def flat_names(names: Sequence[str]) -> dict[str, str]:
    """By name, one without folders and ending, for formats that have one folder for all pictures.

    Of those that would be called the same, like ``a.png`` and ``a.jpg``, each gets a mark of its
    own.
    """
    short = {name: "__".join(Path(name).with_suffix("").parts) for name in names}
    times = Counter(short.values())
    return {
        name: one if times[one] == 1 else f"{one}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, one in short.items()
    }


def _coco(out: Path, pictures: Path, lines: Sequence[Json]) -> Path:
    """Images first, as the manifest knows them, then the annotations, picture by picture."""
    with _whole(out / COCO) as file:
        file.write('{"images": [')
        images = (
            {
                "id": number,
                "file_name": line["name"],
                "height": line["height"],
                "width": line["width"],
            }
            for number, line in enumerate(lines, start=1)
        )
        _write_list(file, images)
        file.write('], "annotations": [')
        _write_list(file, _coco_annotations(out, lines))
        file.write(f'], "categories": {json.dumps(CATEGORIES)}}}\n')
    return out / COCO


def _coco_annotations(out: Path, lines: Sequence[Json]) -> Iterator[Json]:
    number = 0
    for image, line in enumerate(lines, start=1):
        one = CocoDataset()
        one.add(line["name"], _result(out, line["name"]))
        for annotation in one.annotations:
            number += 1
            yield annotation | {"id": number, "image_id": image}


def _yolo(out: Path, pictures: Path, lines: Sequence[Json]) -> Path:
    """Pictures and label files side by side; the classes are all characters that occur."""
    root = out / "yolo"
    classes = sorted({character for line in lines for character in line["characters"]})
    for name, short in flat_names([line["name"] for line in lines]).items():
        text = "".join(f"{line}\n" for line in yolo_lines(_result(out, name), classes))
        write(root / "labels" / f"{short}.txt", text.encode())
        write(root / "images" / f"{short}{Path(name).suffix}", (pictures / name).read_bytes())
    write(root / "data.yaml", yolo_yaml(classes).encode())
    return root


def _textseg(out: Path, pictures: Path, lines: Sequence[Json]) -> Path:
    root = out / "textseg"
    for name, short in flat_names([line["name"] for line in lines]).items():
        write_textseg(root, short, open_picture(pictures / name), _result(out, name))
    return root


def _label_studio(out: Path, pictures: Path, lines: Sequence[Json]) -> Path:
    """Tasks whose pictures are local files of Label Studio, whose root holds the folder."""
    folder = pictures.resolve().name
    with _whole(out / LABEL_STUDIO) as file:
        file.write("[")
        named = ((line["name"], quote(f"{folder}/{line['name']}")) for line in lines)
        _write_list(
            file,
            (label_studio.task(LOCAL_FILES + path, _result(out, name)) for name, path in named),
        )
        file.write("]\n")
    return out / LABEL_STUDIO


def _done(out: Path, pictures: Path) -> Iterator[Json]:
    """The lines of pictures with words; a folder may have cars in it, too."""
    for line in done(out):
        if "characters" not in line:
            continue
        if (pictures / line["name"]).is_file():
            yield line
        else:
            remark(f"{line['name']} is no longer in {pictures}, so the data set is without it")


def _frames(out: Path) -> Iterator[writers.LabelledFrame]:
    """The frames with cars, or without any; one whose boxes cannot be written is named."""
    for line in done(out):
        if "cars" not in line:
            continue
        data = (out / "labels" / f"{line['name']}.json").read_bytes()
        frame = labelled_frame(parse(data, CarLabels), f"{line['name']}.png")
        try:
            frame.boxes()
        except InvalidRequest as error:
            complain(error.message)
        else:
            yield frame


def _result(out: Path, name: str) -> PictureResult:
    data = (out / "labels" / f"{name}.json").read_bytes()
    return picture_result(parse(data, TextLabels))


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that is there once all of it has been written."""
    unfinished = path.with_name(f".{path.name}.partial")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    unfinished.replace(path)


def _write_list(file: TextIO, values: Iterator[Json]) -> None:
    for place, value in enumerate(values):
        file.write(("," if place else "") + "\n" + json.dumps(value, ensure_ascii=False))
