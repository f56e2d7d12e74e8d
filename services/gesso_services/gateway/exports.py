"""A finished annotation as a file that other tools read.

Text: ``coco`` and ``label-studio`` are JSON, ``yolo`` and ``textseg`` zip archives. Cars: ``kitti``
is the text of a result file, ``coco`` is JSON with the masks.
"""

import json
import zipfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

from gesso_contracts import AnnotatedCar, CarLabels, MaskCode, TextLabels
from gesso_core.annotate.char_sam import label_studio
from gesso_core.annotate.char_sam.words import PictureResult
from gesso_core.annotate.char_sam.writers import (
    CocoDataset,
    write_textseg,
    yolo_classes,
    yolo_lines,
)
from gesso_core.pipelines.pictures import decode_picture

from gesso_services.annotation_labels import picture_result, placed_mask

ExportFormat = Literal["coco", "yolo", "label-studio", "textseg", "kitti"]
TEXT_FORMATS: Final = ("coco", "yolo", "label-studio", "textseg")
CAR_FORMATS: Final = ("kitti", "coco")
JSON: Final = "application/json"
ZIP: Final = "application/zip"
PLAIN: Final = "text/plain"
_SUFFIXES: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


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
        """The picture under its own name, or under that of its job."""
        return cls(name or f"{job_id}.{_SUFFIXES.get(media_type, 'png')}", data, media_type)


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
    if wanted == "label-studio":
        # Label Studio shows a picture that is part of the task, wherever the task goes.
        address = f"data:{picture.media_type};base64,{b64encode(picture.data).decode()}"
        task = label_studio.task(address, result)
        return _json([task], f"{picture.stem}.label-studio.json")
    files = _yolo(picture, result) if wanted == "yolo" else _textseg(picture, result)
    return File(_zip(files), ZIP, f"{picture.stem}.{wanted}.zip")


def cars_file(labels: CarLabels, kitti: str, picture: Picture, wanted: ExportFormat) -> File:
    """Cars in one of ``CAR_FORMATS``."""
    if wanted == "kitti":
        return File(kitti.encode(), PLAIN, f"{picture.stem}.txt")
    found = [(one.mask, one.car) for one in labels.objects if one.car is not None]
    return _json(
        {
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
        },
        f"{picture.stem}.coco.json",
    )


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
        "attributes": car.model_dump(mode="json", exclude={"corners", "energies", "score"}),
    }


def _yolo(picture: Picture, result: PictureResult) -> Mapping[str, bytes]:
    """A YOLO data set of one picture, whose classes are the characters that occur."""
    classes = yolo_classes([result])
    names = "".join(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(classes))
    lines = "".join(f"{line}\n" for line in yolo_lines(result, classes))
    return {
        "data.yaml": f"path: .\ntrain: images\nval: images\nnames:\n{names}".encode(),
        f"images/{picture.name}": picture.data,
        f"labels/{picture.stem}.txt": lines.encode(),
    }


def _textseg(picture: Picture, result: PictureResult) -> Mapping[str, bytes]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_textseg(root, picture.stem, decode_picture(picture.data), result)
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


def _json(content: Any, name: str) -> File:
    return File(json.dumps(content, ensure_ascii=False).encode(), JSON, name)


def _zip(files: Mapping[str, bytes]) -> bytes:
    """The files in one archive that is the same whenever it is made."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return archive.getvalue()
