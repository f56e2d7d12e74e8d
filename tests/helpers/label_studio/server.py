"""A project in a running Label Studio, whose model is a gateway; driven by the real SDK.

Run by the Python of `make label-studio`, which has no gesso: `python server.py FOLDER`. The folder
has `asked.json` with the addresses of both servers, the token of the one and the key of the other,
the labelling interface (`brush.xml`) and a picture (`sign.png`), and in `shared/signs` another.
What Label Studio has in the end is written to `found.json`, the masks to `masks.npz`.
"""

import base64
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import requests
from label_studio_sdk import LabelStudio
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.core import ApiError

CLICK = {"type": "keypointlabels", "original_width": 240, "original_height": 100}
CLICK |= {"is_positive": True, "value": {"x": 30.0, "y": 50.0, "keypointlabels": ["word"]}}


class Project:
    """One project and its model."""

    def __init__(self, folder: Path, asked: dict[str, str]) -> None:
        self.folder, self.asked = folder, asked
        self.studio = LabelStudio(base_url=asked["label_studio"], api_key=asked["token"])
        config = (folder / "brush.xml").read_text()
        self.id = self.studio.projects.create(title="Street signs", label_config=config).id

    def connect(self, password: str) -> Any:
        """Label Studio asks the gateway for its health, then whether the interface suits it."""
        return self.studio.ml.create(
            project=self.id,
            url=f"{self.asked['gateway']}/label-studio",
            title="gesso",
            is_interactive=True,
            auth_method="BASIC_AUTH",
            basic_auth_user="anyone",
            basic_auth_pass=password,
        )

    def refusal(self, password: str) -> str:
        try:
            self.connect(password)
        except ApiError as error:
            return str(error.body)
        return ""

    def fill(self) -> None:
        """Tasks with a picture inside, with one elsewhere, uploaded, and from a shared folder."""
        picture = (self.folder / "sign.png").read_bytes()
        inside = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        tasks = [{"image": inside}, {"image": "http://localhost/far.png"}]
        self.studio.projects.import_tasks(id=self.id, request=tasks)
        self._post(f"projects/{self.id}/import", files={"sign.png": picture})
        storage = self.studio.import_storage.local.create(
            project=self.id, path=str(self.folder / "shared/signs"), use_blob_urls=True
        )
        self.studio.import_storage.local.sync(id=storage.id)

    def act(self, action: str) -> None:
        """What the data manager offers for the chosen tasks, here for all of them."""
        chosen = {"all": True, "excluded": []}
        self.studio.actions.create(id=action, project=self.id, selected_items=chosen)

    def tasks(self) -> dict[int, str]:
        """What kind of address each task has."""
        listed = self.studio.tasks.list(project=self.id, fields="all")
        return {task.id: task.data["image"][:12] for task in listed}

    def click(self, model: int, task: int) -> Any:
        """What the labelling page asks while a person works; the SDK drops the answer."""
        body = {"task": task, "context": {"result": [CLICK]}}
        return self._post(f"ml/{model}/interactive-annotating", json=body).json()["data"]

    def exported(self, kind: str) -> bytes:
        return self.studio.projects.exports.as_binary(self.id, export_type=kind)

    def _post(self, route: str, **body: Any) -> requests.Response:
        headers = {"Authorization": f"Token {self.asked['token']}"}
        url = f"{self.asked['label_studio']}/api/{route}"
        answer = requests.post(url, headers=headers, timeout=60, **body)
        assert answer.ok, answer.text
        return answer


def masks(task: int, regions: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Brushes by task and region."""
    return {
        f"{task}/{one['id']}": decode_rle(one["value"]["rle"]).reshape(
            one["original_height"], one["original_width"], 4
        )[..., 3]
        for one in regions
    }


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    project = Project(folder, asked)
    refusal = project.refusal("wrong")
    model = project.connect(asked["key"])
    project.fill()
    project.act("retrieve_tasks_predictions")
    tasks = project.tasks()
    predictions = list(project.studio.predictions.list(project=project.id))
    project.act("retrieve_tasks_predictions")  # nothing is left to ask for
    again = list(project.studio.predictions.list(project=project.id))
    first = next(iter(tasks))
    (click,) = project.click(model.id, first)["result"]
    click["id"] = "click"
    project.act("predictions_to_annotations")
    with zipfile.ZipFile(io.BytesIO(project.exported("BRUSH_TO_COCO"))) as packed:
        coco = json.loads(packed.read(next(n for n in packed.namelist() if n.endswith(".json"))))
    found = {
        "refusal": refusal,
        "model": [model.readable_state, model.model_version],
        "tasks": tasks,
        "predictions": [[p.task, p.model_version, p.score, len(p.result)] for p in predictions],
        "again": len(again),
        "coco": coco["images"],
    }
    drawn = {name: m for p in predictions for name, m in masks(p.task, p.result).items()}
    np.savez(folder / "masks.npz", **drawn, **masks(first, [click]))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
