"""A finished annotation as a file that other tools read.

Text: ``coco`` and ``label-studio`` are JSON, ``yolo`` and ``textseg`` zip archives; of signs that
were drawn, ``coco`` is a zip archive, too, because nobody else has the pictures. Cars: ``kitti``
is the text of a result file, ``coco`` is JSON with the masks; ``nuscenes``, ``openlabel`` and
``sustech`` are JSON with the boxes in the frame of the LiDAR.
"""

import json
import zipfile
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal

from gesso_contracts import AnnotatedCar, CarLabels, MaskCode, SignsDrawn, TextLabels
from gesso_core.annotate.char_sam import label_studio
from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.char_sam.writers import (
    CocoDataset,
    textseg_files,
    yolo_classes,
    yolo_lines,
    yolo_yaml,
)
from gesso_core.annotate.kitti import writers
from gesso_core.pipelines.pictures import decode_picture

from gesso_services.annotation_labels import labelled_frame, picture_result, placed_mask

ExportFormat = Literal[
    "coco", "yolo", "label-studio", "textseg", "kitti", "nuscenes", "openlabel", "sustech"
]
TEXT_FORMATS: Final = ("coco", "yolo", "label-studio", "textseg")
CAR_FORMATS: Final = ("kitti", "coco", "nuscenes", "openlabel", "sustech")
JSON: Final = "application/json"
ZIP: Final = "application/zip"
PLAIN: Final = "text/plain"
COMPOSED: Final = "The words were set by a font and put into the pictures; no model drew them."
ENDINGS: Final = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@dataclass(frozen=True)
class Picture:
    """The picture that was annotated: its file name, bytes and media type."""

    name: str
    data: bytes
    media_type: str

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @classmethod
    def named(cls, name: str | None, job_id: str, data: bytes, media_type: str) -> "Picture":
        """The picture under its own name, or under that of its job, with the ending by which other
        tools know a picture.
        """
        name = name or job_id
        if not name.lower().endswith((*ENDINGS.values(), ".jpeg")):
            name += ENDINGS.get(media_type, ".png")
        return cls(name, data, media_type)


Labelled = Sequence[tuple[Picture, PictureResult]]


@dataclass(frozen=True)
class File:
    """What is sent: bytes, their media type, and the name to keep them under."""

    data: bytes
    media_type: str
    name: str


def text_file(labels: TextLabels, picture: Picture, wanted: ExportFormat) -> File:
    """Words in one of ``TEXT_FORMATS``. Takes a while for large pictures: call it in a thread."""
    result = picture_result(labels)
    if wanted == "coco":
        data_set = CocoDataset()
        data_set.add(picture.name, result)
        return _json(data_set.to_json(), f"{picture.stem}.coco.json")
    return _text_set([(picture, result)], picture.stem, wanted)


def signs_file(
    signs: Sequence[tuple[Picture, TextLabels]],
    made: SignsDrawn,
    stem: str,
    wanted: ExportFormat,
) -> File:
    """All pictures of a job that drew and labelled signs, in one of ``TEXT_FORMATS``; ``coco`` is
    a zip archive of the pictures and ``annotations.json``, which says how they were made.
    """
    labelled = [(picture, picture_result(labels)) for picture, labels in signs]
    if wanted != "coco":
        return _text_set(labelled, stem, wanted)
    data_set = CocoDataset()
    for picture, result in labelled:
        data_set.add(picture.name, result)
    told = made.model_dump(mode="json", include={"text", "agreement", "generator", "provenance"})
    content = {"info": {"description": COMPOSED, **told}, **data_set.to_json()}
    files = {f"images/{picture.name}": picture.data for picture, _ in labelled}
    files["annotations.json"] = json.dumps(content, ensure_ascii=False).encode()
    return File(_zip(files), ZIP, f"{stem}.coco.zip")


def cars_file(labels: CarLabels, kitti: str, picture: Picture, wanted: ExportFormat) -> File:
    """Cars in one of ``CAR_FORMATS``; InvalidRequest for a calibration that stretches, where boxes
    shall be in the frame of the LiDAR.
    """
    if wanted == "kitti":
        return File(kitti.encode(), PLAIN, f"{picture.stem}.txt")
    if wanted == "coco":
        return _json(_coco_cars(labels, picture), f"{picture.stem}.coco.json")
    frame = labelled_frame(labels, picture.name)
    if wanted == "sustech":  # which looks for its labels under the name of the frame
        return _json(writers.sustech(frame), f"{picture.stem}.json")
    content = writers.openlabel(frame) if wanted == "openlabel" else writers.nuscenes([frame])
    return _json(content, f"{picture.stem}.{wanted}.json")


def _coco_cars(labels: CarLabels, picture: Picture) -> dict[str, Any]:
    found = [(one.mask, one.car) for one in labels.objects if one.car is not None]
    return {
        "images": [
            {
                "id": 1,
                "file_name": picture.name,
                "height": labels.height,
                "width": labels.width,
            }
        ],
        "annotations": [_car(mask, car, n) for n, (mask, car) in enumerate(found, start=1)],
        "categories": [{"id": 1, "name": "car"}],
    }


def _car(code: MaskCode, car: AnnotatedCar, number: int) -> dict[str, Any]:
    mask = placed_mask(code)
    height, width = mask.window_hw.shape
    return {
        "id": number,
        "image_id": 1,
        "category_id": 1,
        "segmentation": {"size": list(code.size), "counts": code.counts},
        "area": mask.area,
        "bbox": [mask.x, mask.y, width, height],
        "iscrowd": 0,
        "score": round(car.score, 4),
        "attributes": car.model_dump(
            mode="json", exclude={"code", "corners", "energies", "pose", "score"}
        ),
    }


def _text_set(labelled: Labelled, stem: str, wanted: ExportFormat) -> File:
    if wanted == "label-studio":
        tasks = [
            label_studio.task(_data_url(picture), result, file_name=picture.name)
            for picture, result in labelled
        ]
        return _json(tasks, f"{stem}.label-studio.json")
    files = _yolo(labelled) if wanted == "yolo" else _textseg(labelled)
    return File(_zip(files), ZIP, f"{stem}.{wanted}.zip")


def _data_url(picture: Picture) -> str:
    """Label Studio shows a picture that is part of the task, wherever the task goes."""
    return f"data:{picture.media_type};base64,{b64encode(picture.data).decode()}"


def _yolo(labelled: Labelled) -> Mapping[str, bytes]:
    """A YOLO data set, whose classes are the characters that occur."""
    classes = yolo_classes([result for _, result in labelled])
    files = {"data.yaml": yolo_yaml(classes).encode()}
    for picture, result in labelled:
        lines = "".join(f"{line}\n" for line in yolo_lines(result, classes))
        files[f"images/{picture.name}"] = picture.data
        files[f"labels/{picture.stem}.txt"] = lines.encode()
    return files


def _textseg(labelled: Labelled) -> Mapping[str, bytes]:
    files: dict[str, bytes] = {}
    for picture, result in labelled:
        files |= textseg_files(picture.stem, decode_picture(picture.data), result)
    return dict(sorted(files.items()))


def _json(content: Any, name: str) -> File:
    return File(json.dumps(content, ensure_ascii=False).encode(), JSON, name)


def _zip(files: Mapping[str, bytes]) -> bytes:
    """The files in one archive that is the same whenever it is made."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return archive.getvalue()
