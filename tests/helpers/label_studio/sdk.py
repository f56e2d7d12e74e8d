"""What the real SDK of Label Studio makes of a gateway's answers.

Run by the Python of `make label-studio`, which has no gesso: `python sdk.py GATEWAY FOLDER`. The
folder has a labelling interface with brushes and one with polygons (`brush.xml`, `polygon.xml`), a
picture (`sign.png`) and an export of it (`export.json`). What the SDK says of all that is written
to `found.json`, the masks that it decodes to `masks.npz`.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import requests
from label_studio_sdk.converter import Converter
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface

Prediction = dict[str, Any]
CLICK = {"type": "keypointlabels", "is_positive": True}
CLICK["value"] = {"x": 30.0, "y": 50.0, "width": 0.5, "keypointlabels": ["word"]}


class Backend:
    """Asks a gateway as Label Studio does, and has each answer judged by the SDK."""

    def __init__(self, url: str, config: str, picture: bytes) -> None:
        self.url, self.config, self.interface = url, config, LabelInterface(config)
        self.interface.validate()
        address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        image = next(iter(self.interface.objects)).value_name
        self.task = {"id": 1, "data": {image: address}}
        assert self.interface.validate_task(self.task)

    def post(self, route: str, body: dict[str, Any]) -> Any:
        answer = requests.post(f"{self.url}/label-studio/{route}", json=body, timeout=60)
        assert answer.ok, answer.text
        return answer.json()

    def setup(self) -> str:
        body = {"project": "1.1700000000", "schema": self.config, "extra_params": None}
        answer = self.post("setup", body | {"hostname": "http://localhost", "access_token": "x"})
        return str(answer["model_version"])

    def predict(self, *tasks: dict[str, Any], context: Any = None) -> list[Prediction]:
        body = {"project": "1.1700000000", "label_config": self.config, "tasks": list(tasks)}
        params = {"login": None, "password": None, "context": context}
        return list(self.post("predict", body | {"params": params})["results"])

    def errors(self, prediction: Prediction) -> list[str]:
        return list(self.interface.validate_prediction(prediction, return_errors=True))


def masks(prediction: Prediction) -> dict[str, np.ndarray]:
    """The brushes of a prediction, by the names of their regions."""
    return {
        one["id"]: decode_rle(one["value"]["rle"]).reshape(
            one["original_height"], one["original_width"], 4
        )[..., 3]
        for one in prediction["result"]
    }


def convert(config: str, prediction: Prediction, folder: Path, wanted: str) -> None:
    """Have the SDK's converter write accepted regions, each as a picture of its own."""
    folder.mkdir()
    tasks = [
        {
            "id": number,
            "data": {"image": f"/data/upload/1/{region['id']}.png"},
            "annotations": [{"id": number, "completed_by": 1, "result": [region]}],
        }
        for number, region in enumerate(prediction["result"])
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    converter = Converter(config, str(folder))
    converter.convert(str(folder / "tasks.json"), str(folder), wanted, is_dir=False)


def coco_boxes(file: Path) -> dict[str, list[list[float]]]:
    """The boxes of every part of a region."""
    content = json.loads(file.read_text())
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    found: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for one in content["annotations"]:
        found[names[one["image_id"]]].append(one["bbox"])
    return found


def export_of_ours(folder: Path, config: str) -> dict[str, Any]:
    """Our export as Label Studio has it once a person has accepted the prediction."""
    (task,) = json.loads((folder / "export.json").read_text())
    (prediction,) = task["predictions"]
    errors = LabelInterface(config).validate_prediction(prediction, return_errors=True)
    accepted = {"id": 1, "completed_by": 1, "result": prediction["result"]}
    task |= {"id": 1, "annotations": [accepted]}
    (folder / "accepted.json").write_text(json.dumps([task]))
    out = folder / "coco"
    Converter(config, str(out)).convert(
        str(folder / "accepted.json"), str(out), "BRUSH_TO_COCO", is_dir=False
    )
    coco = json.loads((out / "result_coco.json").read_text())
    return {"errors": errors, "images": coco["images"], "parts": len(coco["annotations"])}


def main(url: str, folder: Path) -> None:
    picture = (folder / "sign.png").read_bytes()
    brush = Backend(url, (folder / "brush.xml").read_text(), picture)
    polygon = Backend(url, (folder / "polygon.xml").read_text(), picture)
    bad = {"id": 2, "data": dict.fromkeys(brush.task["data"], "http://localhost/a.png")}
    words, empty = brush.predict(brush.task, bad)
    (click,) = brush.predict(brush.task, context={"result": [CLICK]})
    (outlined,) = polygon.predict(polygon.task)
    np.savez(folder / "masks.npz", click=masks(click).popitem()[1], **masks(words))
    convert(brush.config, words, folder / "brushes", "BRUSH_TO_COCO")
    convert(polygon.config, outlined, folder / "polygons", "COCO")
    convert(polygon.config, outlined, folder / "yolo", "YOLO")
    found = {
        "model_version": [brush.setup(), polygon.setup()],
        "errors": [brush.errors(one) for one in (words, empty, click)] + [polygon.errors(outlined)],
        "reason": empty["error"],
        "regions": [one["id"] for one in words["result"]],
        "outlines": {one["id"]: one["value"]["points"] for one in outlined["result"]},
        "brush_boxes": coco_boxes(folder / "brushes" / "result_coco.json"),
        "polygon_boxes": coco_boxes(folder / "polygons" / "result.json"),
        "yolo": {path.stem: path.read_text() for path in (folder / "yolo/labels").iterdir()},
        "classes": (folder / "yolo" / "classes.txt").read_text().split(),
        "export": export_of_ours(folder, brush.config),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
