"""Signs drawn and labelled over HTTP: the real annotation service behind the small painter."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from gesso_core.pipelines.pictures import decode_picture
from gesso_services.cli.main import app
from PIL import Image
from typer.testing import CliRunner

pytestmark = pytest.mark.broker

DRAW = "/v1/annotations/draw"
WIDTH, HEIGHT = 320, 256
WISH: dict[str, Any] = {
    "prompt": "a wall",
    "words": ["OPEN"],
    "n": 2,
    "seed": 7,
    "size": f"{WIDTH}x{HEIGHT}",
}


@pytest.fixture(scope="module")
def studio(
    start_services: Any,
    new_specs: Any,
    annotation_spec: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A gateway before painter, coder, seer and annotation, on a broker of their own."""
    folder = tmp_path_factory.mktemp("studio-nats")
    with start_services(folder, lambda: [*new_specs(), annotation_spec()]) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def http(studio: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=studio.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def made(http: httpx2.Client) -> dict[str, Any]:
    answer = http.post(DRAW, json=WISH)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_signs_come_back_with_labels_their_agreement_and_who_made_what(
    http: httpx2.Client, made: dict[str, Any]
) -> None:
    assert (made["object"], made["text"], made["words"]) == (
        "annotation.signs",
        "composed",
        ["OPEN"],
    )
    assert (made["generator"]["model"], made["provenance"]["model"]) == ("sana-tiny", "char-sam")
    assert [(sign["index"], sign["seed"]) for sign in made["pictures"]] == [(0, 7), (1, 8)]
    assert made["agreement"] == pytest.approx(np.mean([s["agreement"] for s in made["pictures"]]))
    for sign in made["pictures"]:
        (word,) = sign["words"]
        assert [character["char"] for character in word["characters"]] == list("OPEN")
        for part in ("image", "overlay"):
            assert decode_picture(http.get(sign[part]).content).shape == (HEIGHT, WIDTH, 3)
        behind = http.get(f"/v1/jobs/{sign['job']}").json()
        assert (behind["service"], behind["status"]) == ("diffusion", "succeeded")
    assert http.get(f"/v1/jobs/{made['id']}/result").json() == made


# pycocotools is older than the NumPy rule it breaks.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_coco_export_is_a_data_set_that_agrees_with_the_truth_as_told(
    http: httpx2.Client, made: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools", reason="pip install pycocotools")
    from pycocotools.coco import COCO

    answer = http.get(made["exports"]["coco"])
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        packed.extractall(tmp_path)
    data = COCO(str(tmp_path / "annotations.json"))
    assert data.dataset["info"]["text"] == "composed"
    assert "no model drew them" in data.dataset["info"]["description"]
    assert [image["file_name"] for image in data.dataset["images"]] == ["sign-7.png", "sign-8.png"]
    for image, sign in zip(data.dataset["images"], made["pictures"], strict=True):
        data_png = (tmp_path / "images" / image["file_name"]).read_bytes()
        assert data_png == http.get(sign["image"]).content
        labelled = data.loadAnns(data.getAnnIds(image["id"]))
        assert [one["area"] for one in labelled] == [int(data.annToMask(o).sum()) for o in labelled]
        refused = sum(c["refused"] is not None for w in sign["words"] for c in w["characters"])
        assert sum(one["category_id"] == 1 for one in labelled) == 4 - refused
        (word,) = sign["words"]
        seen = data.annToMask({"image_id": image["id"], "segmentation": word["mask"]}) > 0
        truth = np.asarray(Image.open(io.BytesIO(http.get(sign["truth"]).content)))
        assert set(np.unique(truth)) == {0, 1, 2, 3, 4}
        agreement = (seen & (truth > 0)).sum() / (seen | (truth > 0)).sum()
        assert sign["agreement"] == pytest.approx(agreement)


def test_the_other_exports_hold_every_picture(http: httpx2.Client, made: dict[str, Any]) -> None:
    names = {}
    for wanted in ("yolo", "textseg"):
        data = http.get(made["exports"][wanted]).content
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            names[wanted] = set(packed.namelist())
    assert names["yolo"] >= {"images/sign-7.png", "labels/sign-8.txt", "data.yaml"}
    assert names["textseg"] >= {"mask/sign-7.png", "annotation/sign-8.json"}
    tasks = http.get(made["exports"]["label-studio"]).json()
    assert [task["data"]["image"][:22] for task in tasks] == ["data:image/png;base64,"] * 2
    answer = http.get(f"/v1/jobs/{made['id']}/export", params={"format": "kitti"})
    assert (answer.status_code, answer.json()["field"]) == (422, "format")


@pytest.mark.parametrize(
    ("changes", "status", "field", "word"),
    [
        ({"generator": "sana-9000"}, 404, "generator", "draws no signs here"),
        ({"generator": "vilau-tiny"}, 404, "generator", "like sana-tiny"),
        ({"model": "sana-tiny"}, 404, "model", "cannot label the signs that are drawn here"),
        ({"words": []}, 422, "words", "at least 1"),
        ({"words": ["a"] * 9}, 422, "words", "at most 8"),
        ({"words": ["OPEN", " "]}, 422, "words.1", "pattern"),
        ({"words": ["OPEN", "京都"]}, 422, "words.1", "GESSO_ANNOTATION_FONTS"),
        ({"n": 17}, 422, "n", "less than or equal to 16"),
        ({"size": "128x128"}, 422, "size", "256 to 2048"),
        ({"size": "2048x256"}, 422, "size", "longer than 4 to 1"),
        ({"prompt": ""}, 422, "prompt", "at least 1"),
        ({"colour": "red"}, 422, "colour", "not permitted"),
    ],
)
def test_what_cannot_be_drawn_or_written_is_refused_by_its_field(
    http: httpx2.Client, changes: dict[str, Any], status: int, field: str, word: str
) -> None:
    answer = http.post(DRAW, json=WISH | changes)
    body = answer.json()
    assert (answer.status_code, body["field"]) == (status, field), body
    assert word in body["detail"]


def test_a_server_that_draws_nothing_says_so(label: httpx2.Client) -> None:
    answer = label.post(DRAW, json=WISH)
    assert (answer.status_code, answer.json()["field"]) == (404, "generator")
    assert "the service 'diffusion', which has none now" in answer.json()["detail"]


def test_a_job_under_an_id_of_ones_own_gives_the_same_signs_and_a_wrong_generator_is_told(
    http: httpx2.Client, made: dict[str, Any]
) -> None:
    request = {
        "model": "char-sam",
        "generator": "sana-tiny",
        "prompt": "a wall",
        "words": ["OPEN"],
        "pictures": 2,
        "seed": 7,
        "width": WIDTH,
        "height": HEIGHT,
        "drawn_width": 72,
        "drawn_height": 56,
    }
    job = {"kind": "draw-signs", "request": request}
    assert http.put("/v1/jobs/mine", json=job).status_code == 202
    http.get("/v1/jobs/mine/events")  # ends when the job does
    mine = http.get("/v1/jobs/mine/result").json()
    assert [sign["words"] for sign in mine["pictures"]] == [
        sign["words"] for sign in made["pictures"]
    ]
    job["request"] = request | {"generator": "sana-9000"}
    answer = http.put("/v1/jobs/other", json=job)
    assert (answer.status_code, answer.json()["field"]) == (404, "request.generator")


def test_the_same_key_again_is_the_same_job_and_no_picture_has_another_number(
    http: httpx2.Client,
) -> None:
    headers, wish = {"Idempotency-Key": "signs"}, {**WISH, "n": 1, "wait": False}
    first, again = (http.post(DRAW, json=wish, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    http.get(f"/v1/jobs/{first['id']}/events")
    answer = http.get(f"/v1/annotations/{first['id']}/pictures/1/image")
    assert (answer.status_code, "it has 1" in answer.json()["detail"]) == (404, True)
    answer = http.get(f"/v1/annotations/{first['id']}/overlay")
    assert answer.status_code == 404


def test_the_command_takes_the_words_from_the_prompt_and_writes_a_data_set(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        env = {"COLUMNS": "300", "TERM": "dumb", "GESSO_URL": studio.url}
        return CliRunner().invoke(app, ["annotate", "draw", *words], env=env)

    result = run('a sign that says "OPEN"', "--seed", "7", "--size", "320x256", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "out/images/sign-7.png  seed 7  agreement 0." in result.stdout
    data = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["sign-7.png"]
    for folder in ("images", "overlays", "truth"):
        written = (tmp_path / "out" / folder / "sign-7.png").read_bytes()
        assert decode_picture(written).shape == (HEIGHT, WIDTH, 3)
    silent = run("a wall")
    assert (silent.exit_code, "what shall the sign say?" in silent.stderr) == (1, True)
