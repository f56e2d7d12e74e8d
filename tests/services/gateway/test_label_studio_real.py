"""The answers for Label Studio in the hands of its own SDK, and of a Label Studio that runs.

Both live in an environment of their own: `make label-studio`.
"""

import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from gesso_core.annotate.masks import box_of_mask, decode_mask
from PIL import Image, ImageDraw, ImageFont

PYTHON = Path.home() / ".cache/gesso/label-studio/bin/python"
EMPTY = PYTHON.parents[1] / "empty"  # its data base as it is at first, which takes long to make
SCRIPTS = Path(__file__).parents[2] / "helpers/label_studio"
WIDTH, HEIGHT = 240, 100
BRUSH = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="label" toName="image">
    <Label value="word"/><Label value="character"/>
  </BrushLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="word"/></KeyPointLabels>
</View>"""
POLYGON = """<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="label" toName="image">
    <Label value="word"/><Label value="character"/>
  </PolygonLabels>
</View>"""

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON.exists() and EMPTY.is_dir()), reason="needs Label Studio: make label-studio"
    ),
]


def sign() -> bytes:
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210))
    font = ImageFont.load_default(64)
    ImageDraw.Draw(image).text((120, 50), "OPEN", (20, 30, 80), font, anchor="mm")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def ours(label: httpx2.Client) -> Any:
    """The same picture by our own routes: words, and a click."""
    files = {"image": ("sign.png", sign(), "image/png")}
    words = label.post("/v1/annotations/text", files=files)
    assert words.status_code == 200, words.text
    prompts = json.dumps([{"points": [[0.3 * WIDTH, 0.5 * HEIGHT]], "labels": [1]}])
    click = label.post("/v1/annotations/segment", files=files, data={"prompts": prompts})
    assert click.status_code == 200, click.text
    return words.json() | {"click": click.json()["masks"][0]}


@pytest.fixture(scope="module")
def masks(ours: Any) -> dict[str, np.ndarray]:
    """Those, by the names of the regions."""
    named = {"click": ours["click"]["mask"]}
    for number, word in enumerate(ours["words"]):
        named[f"w{number}"] = word["mask"]
        named |= {f"w{number}c{one['index']}": one["mask"] for one in word["characters"]}
    return {name: decode_mask(mask) for name, mask in named.items()}


def run(script: str, *arguments: str) -> None:
    command = [str(PYTHON), str(SCRIPTS / script), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(label: httpx2.Client, ours: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the SDK has left what it found."""
    folder = tmp_path_factory.mktemp("sdk")
    (folder / "brush.xml").write_text(BRUSH)
    (folder / "polygon.xml").write_text(POLYGON)
    (folder / "sign.png").write_bytes(sign())
    (folder / "export.json").write_bytes(label.get(ours["exports"]["label-studio"]).content)
    run("sdk.py", str(label.base_url).rstrip("/"), str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    return json.loads((folder / "found.json").read_text())


def test_the_sdk_finds_nothing_wrong_with_any_prediction(found: Any) -> None:
    assert found["model_version"] == ["char-sam", "char-sam"]
    assert found["errors"] == [[], [], [], []]
    assert found["export"]["errors"] == []
    assert "no address over the network" in found["reason"]


def test_the_brushes_that_the_sdk_decodes_are_our_masks_to_the_bit(
    folder: Path, found: Any, masks: dict[str, np.ndarray]
) -> None:
    assert len(masks) == 6  # the word, its four characters, and what was clicked
    assert found["regions"] == [name for name in masks if name != "click"]
    with np.load(folder / "masks.npz") as decoded:
        assert set(decoded) == set(masks)
        for name, mask in masks.items():
            assert set(np.unique(decoded[name])) <= {0, 255}
            assert ((decoded[name] > 0) == mask).all(), name


def test_the_boxes_of_the_sdk_s_coco_are_those_of_our_masks(
    found: Any, masks: dict[str, np.ndarray]
) -> None:
    for name, boxes in found["brush_boxes"].items():
        assert around(boxes) == box_of_mask(masks[name]), name
    assert set(found["brush_boxes"]) == set(masks) - {"click"}
    parts: dict[str, list[list[float]]] = {}
    for name, (box,) in found["polygon_boxes"].items():
        parts.setdefault(name.partition("p")[0], []).append(box)
    assert set(parts) == set(masks) - {"click"}
    for name, boxes in parts.items():  # outlines may be half a pixel off
        assert around(boxes) == pytest.approx(box_of_mask(masks[name]), abs=0.51), name


def test_the_polygons_of_the_sdk_s_yolo_are_our_outlines(found: Any) -> None:
    assert found["classes"] == ["character", "word"]
    assert set(found["yolo"]) == set(found["outlines"])
    for name, line in found["yolo"].items():
        number, *shares = line.split()
        assert found["classes"][int(number)] == ("character" if "c" in name else "word")
        points = np.array(shares, float).reshape(-1, 2)
        assert np.allclose(points, np.array(found["outlines"][name]) / 100)


def test_an_accepted_export_becomes_a_coco_data_set_under_the_name_of_its_picture(
    found: Any,
) -> None:
    (image,) = found["export"]["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("sign.png", WIDTH, HEIGHT)
    assert found["export"]["parts"] >= len(found["regions"])


@pytest.fixture
def label_studio(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Label Studio that runs, in a folder of its own, and its first user's token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url, token = f"http://127.0.0.1:{port}", secrets.token_hex(20)
    options = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(tmp_path / "data"),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(tmp_path / "shared"),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "USE_DEFAULT_BANNED_SUBNETS": "false",  # or it talks to no model on this machine
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LATEST_VERSION_CHECK": "false",
    }
    if EMPTY.is_dir():
        shutil.copytree(EMPTY, tmp_path / "data")
    command = [str(PYTHON.with_name("label-studio")), "start", "--no-browser", "--port", port]
    command += ["--internal-host", "127.0.0.1", "--username", "a@example.org"]
    command += ["--password", secrets.token_hex(8), "--user-token", token]
    log = tmp_path / "label-studio.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | options, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            wait_for(f"{url}/health", process, log)
            yield {"label_studio": url, "token": token, "log": str(log)}
        finally:
            process.terminate()
            process.wait(20)


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.5)
    pytest.fail(f"Label Studio did not start:\n{log.read_text()[-2000:]}")


@pytest.mark.timeout(500)
def test_a_running_label_studio_gets_its_predictions_from_the_gateway(
    label_studio: dict[str, str],
    start_on_annotator: Any,
    masks: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    gateway = start_on_annotator(
        api_keys="sesame",
        label_studio_uploads=tmp_path / "data/media/upload",
        label_studio_local_files=tmp_path / "shared",
    )
    (tmp_path / "shared/signs").mkdir(parents=True)
    (tmp_path / "shared/signs/a sign.png").write_bytes(sign())
    (tmp_path / "sign.png").write_bytes(sign())
    (tmp_path / "brush.xml").write_text(BRUSH)
    asked = label_studio | {"gateway": gateway.url, "key": "sesame"}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    run("server.py", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert "doesn't look like a valid ML backend" in found["refusal"]
    assert found["model"] == ["Connected", "char-sam"]
    kinds = {int(task): address for task, address in found["tasks"].items()}
    assert sorted(kinds.values()) == [
        "/data/local-",
        "/data/upload",
        "data:image/p",
        "http://local",
    ]
    regions = {task: count for task, _, _, count in found["predictions"]}
    assert {kinds[task]: count for task, count in regions.items()} == {
        "data:image/p": 5, "/data/upload": 5, "/data/local-": 5, "http://local": 0,
    }  # fmt: skip
    assert found["again"] == len(found["predictions"])
    with np.load(tmp_path / "masks.npz") as kept:
        assert len(kept) == 3 * 5 + 1
        for name in kept:
            assert ((kept[name] > 0) == masks[name.partition("/")[2]]).all(), name
    assert len(found["coco"]) == 2  # those whose pictures go by a name


def around(boxes: list[list[float]]) -> tuple[float, ...]:
    """The box around boxes of corner and size."""
    x, y, width, height = np.array(boxes, float).T
    return x.min(), y.min(), (x + width).max(), (y + height).max()
