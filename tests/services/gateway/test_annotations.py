"""Annotation over HTTP: clicks, words and cars, by the real service on random weights."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from gesso_core.annotate.kitti.labels import parse_labels
from gesso_core.annotate.masks import decode_mask
from gesso_core.pipelines.pictures import decode_picture, encode_picture
from PIL import Image, ImageDraw, ImageFont

pytestmark = pytest.mark.broker

SEGMENT, TEXT, CARS = (f"/v1/annotations/{what}" for what in ("segment", "text", "cars"))
WIDTH, HEIGHT = 200, 96
SIGN = {"text": "OPEN", "polygon": [[20, 24], [180, 24], [180, 72], [20, 72]]}
CALIBRATION = """P2: 100 0 100 0 0 100 48 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""
CAR_BOX = {"box": [60, 40, 140, 80]}


def sign(picture_format: str = "PNG", **options: Any) -> bytes:
    """A dark word on a light wall."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210))
    font = ImageFont.load_default(48)
    ImageDraw.Draw(image).text((100, 48), "OPEN", (20, 30, 80), font, anchor="mm")
    file = io.BytesIO()
    image.save(file, picture_format, **options)
    return file.getvalue()


def scan() -> bytes:
    """A road, and the back of a car eight metres ahead."""
    rng = np.random.default_rng(0)
    road = np.column_stack(
        [rng.uniform(4, 30, 2000), rng.uniform(-8, 8, 2000), np.full(2000, -1.7)]
    )
    back = np.column_stack(
        [np.full(300, 8.0), rng.uniform(-0.8, 0.8, 300), rng.uniform(-1.6, -0.2, 300)]
    )
    points = np.concatenate([road, back])
    return np.column_stack([points, np.ones(len(points))]).astype("<f4").tobytes()


def form(**fields: Any) -> dict[str, Any]:
    """Fields of a form: lists as JSON, what is None left out."""
    return {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if value is not None
    }


def cut(http: httpx2.Client, prompts: Any, image: bytes | None = None, **fields: Any) -> Any:
    files = {"image": ("sign.png", image or sign())}
    return http.post(SEGMENT, files=files, data=form(prompts=prompts, **fields))


def words(http: httpx2.Client, image: bytes | None = None, **fields: Any) -> httpx2.Response:
    files = {"image": ("sign.png", image or sign())}
    return http.post(TEXT, files=files, data=form(**fields))


def cars(http: httpx2.Client, points: bytes | None = None, **fields: Any) -> httpx2.Response:
    files = {
        "image": ("000007.png", sign()),
        "calibration": ("000007.txt", fields.pop("calibration", CALIBRATION)),
    }
    if points is not None:
        files["points"] = ("000007.bin", points)
    return http.post(CARS, files=files, data=form(**({"prompts": [CAR_BOX]} | fields)))


def test_a_click_is_answered_with_a_mask_and_the_next_one_finds_the_picture_known(
    label: httpx2.Client,
) -> None:
    image = sign()
    first = cut(label, [{"points": [[100, 48]], "labels": [1]}], image).json()
    again = cut(label, [{"box": [20, 20, 180, 76]}, {"points": [[5, 5]], "labels": [1]}], image)
    body = again.json()
    assert (first["model"], first["width"], first["height"]) == ("sam-mobile", WIDTH, HEIGHT)
    assert body["cached"]
    assert len(body["masks"]) == 2
    for found in first["masks"] + body["masks"]:
        assert decode_mask(found["mask"]).shape == (HEIGHT, WIDTH)
        assert decode_mask(found["mask"]).sum() == found["area"]


@pytest.fixture(scope="module")
def labelled(label: httpx2.Client) -> dict[str, Any]:
    answer = words(label, words=[SIGN])
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_given_words_come_back_with_a_mask_per_character(labelled: dict[str, Any]) -> None:
    assert labelled["object"] == "annotation.text"
    assert (labelled["name"], labelled["transcription"]) == ("sign.png", "given")
    (word,) = labelled["words"]
    assert [character["char"] for character in word["characters"]] == list("OPEN")
    assert decode_mask(word["mask"]).shape == (HEIGHT, WIDTH)
    assert labelled["summary"]["words"] == 1
    assert labelled["provenance"]["segmenter"] == "sam-tiny"


def test_the_overlay_is_a_picture_of_the_same_size(
    label: httpx2.Client, labelled: dict[str, Any]
) -> None:
    answer = label.get(labelled["overlay"])
    assert answer.headers["content-type"] == "image/png"
    assert decode_picture(answer.content).shape == (HEIGHT, WIDTH, 3)


def test_the_result_of_the_job_is_the_same_answer(
    label: httpx2.Client, labelled: dict[str, Any]
) -> None:
    assert label.get(f"/v1/jobs/{labelled['id']}/result").json() == labelled


def test_every_export_of_words_can_be_read_again(
    label: httpx2.Client, labelled: dict[str, Any]
) -> None:
    files = {name: label.get(path) for name, path in labelled["exports"].items()}
    assert set(files) == {"coco", "yolo", "label-studio", "textseg"}
    assert all(answer.status_code == 200 for answer in files.values())
    coco = files["coco"].json()
    assert coco["images"] == [{"id": 1, "file_name": "sign.png", "height": HEIGHT, "width": WIDTH}]
    named = files["coco"].headers["content-disposition"]
    assert named == "attachment; filename=\"sign.coco.json\"; filename*=UTF-8''sign.coco.json"
    (task,) = files["label-studio"].json()
    assert task["data"]["image"].startswith("data:image/png;base64,")
    with zipfile.ZipFile(io.BytesIO(files["yolo"].content)) as packed:
        assert packed.testzip() is None
        assert set(packed.namelist()) == {"data.yaml", "images/sign.png", "labels/sign.txt"}
        assert packed.read("images/sign.png") == sign()
    with zipfile.ZipFile(io.BytesIO(files["textseg"].content)) as packed:
        assert set(packed.namelist()) == {
            "annotation/sign.json",
            "image/sign.png",
            "mask/sign.png",
        }
        (entry,) = json.loads(packed.read("annotation/sign.json"))
        assert entry["text"] == "OPEN"


def test_an_export_that_cannot_hold_the_labels_is_refused_with_those_that_can(
    label: httpx2.Client, labelled: dict[str, Any]
) -> None:
    answer = label.get(f"/v1/jobs/{labelled['id']}/export", params={"format": "kitti"})
    assert (answer.status_code, answer.json()["field"]) == (422, "format")
    assert "coco or yolo or label-studio or textseg" in answer.json()["detail"]


def test_words_that_nobody_gave_are_read(label: httpx2.Client) -> None:
    body = words(label).json()
    assert body["transcription"] == "ocr"
    assert [word["text"] for word in body["words"]] == ["OPEN"]


def test_a_picture_without_text_gives_no_words_and_says_so(label: httpx2.Client) -> None:
    blank = encode_picture(np.full((64, 64, 3), 200, np.uint8))
    answer = words(label, blank)
    assert answer.status_code == 200, answer.text
    assert answer.json()["words"] == []
    assert answer.json()["summary"]["words"] == 0


def test_without_waiting_the_answer_is_a_durable_job(label: httpx2.Client) -> None:
    answer = words(label, words=[SIGN], wait="false")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    label.get(f"/v1/jobs/{job['id']}/events")  # ends when the job does
    body = label.get(f"/v1/jobs/{job['id']}/result").json()
    assert [word["text"] for word in body["words"]] == ["OPEN"]


def test_the_same_key_again_is_the_same_job(label: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "sign"}
    fields = {"files": {"image": ("sign.png", sign())}, "data": form(words=[SIGN])}
    first, again = (label.post(TEXT, headers=headers, **fields).json() for _ in range(2))
    assert first == again


@pytest.fixture(scope="module")
def driven(label: httpx2.Client) -> dict[str, Any]:
    answer = cars(label, scan(), meshes="true", occupancy="0.2")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_prompted_car_is_a_label_line_or_a_reason(
    label: httpx2.Client, driven: dict[str, Any]
) -> None:
    (outcome,) = driven["objects"]
    assert (outcome["car"] is None) == (outcome["refused"] is not None)
    kitti = label.get(driven["exports"]["kitti"])
    assert kitti.headers["content-type"].startswith("text/plain")
    assert len(parse_labels(kitti.text)) == driven["cars"] == (outcome["car"] is not None)
    coco = label.get(driven["exports"]["coco"]).json()
    assert len(coco["annotations"]) == driven["cars"]


def test_the_scene_is_drawn_in_the_picture_and_from_above(
    label: httpx2.Client, driven: dict[str, Any]
) -> None:
    overlay, above = (label.get(driven[part]) for part in ("overlay", "birds_eye"))
    assert decode_picture(overlay.content).shape == (HEIGHT, WIDTH, 3)
    assert decode_picture(above.content).ndim == 3
    assert (driven["meshes"] is None) == (driven["occupancy"] is None) == (driven["cars"] == 0)
    if driven["meshes"]:
        assert label.get(driven["meshes"]).content[:4] == b"glTF"
        assert (
            b"voxels of 0.2 m" in label.get(driven["occupancy"]).content.partition(b"end_header")[0]
        )


def test_other_tools_get_as_many_boxes_as_there_are_cars(
    label: httpx2.Client, driven: dict[str, Any]
) -> None:
    answers = {name: label.get(path) for name, path in driven["exports"].items()}
    assert set(answers) == {"kitti", "coco", "nuscenes", "openlabel", "sustech"}
    made = {name: answers[name].json() for name in ("nuscenes", "openlabel", "sustech")}
    (samples,) = made["nuscenes"]["results"].values()
    objects = made["openlabel"]["openlabel"]["objects"]
    assert len(samples) == len(objects) == len(made["sustech"]) == driven["cars"]
    assert list(made["nuscenes"]["results"]) == ["000007"]
    assert 'filename="000007.json"' in answers["sustech"].headers["content-disposition"]


def test_a_mirrored_calibration_gives_kitti_labels_but_none_for_the_lidar_frame(
    label: httpx2.Client,
) -> None:
    mirrored = CALIBRATION.replace("0 -1 0 0 0 0 -1", "0 1 0 0 0 0 -1")
    made = cars(label, calibration=mirrored).json()
    assert label.get(made["exports"]["kitti"]).status_code == 200
    answer = label.get(made["exports"]["openlabel"])
    assert (answer.status_code, answer.json()["field"]) == (422, "calibration")


def test_a_car_without_a_scan_is_flagged_as_such(label: httpx2.Client) -> None:
    (outcome,) = cars(label).json()["objects"]
    assert outcome["refused"] or "image_only" in outcome["car"]["flags"]


def test_the_models_say_what_they_are_for(label: httpx2.Client) -> None:
    models = label.get("/v1/models").json()["data"]
    assert {model["id"]: model["tasks"] for model in models} == {
        "char-sam": ["text-annotation"],
        "slf-cars": ["car-annotation"],
        "sam-mobile": ["segmentation"],
    }


def test_a_service_without_its_segmenter_says_what_to_do(
    start_services: Any, annotation_spec: Any, tmp_path: Path
) -> None:
    def specs() -> list[Any]:
        return [annotation_spec(folder=None, store=tmp_path / "empty")]

    required = {"required_services": ("annotation",)}
    with (
        start_services(tmp_path / "nats", specs, **required) as gateway,
        httpx2.Client(base_url=gateway.url, timeout=30) as http,
    ):
        health = http.get("/health/ready").json()["services"]["annotation"]
        models = http.get("/v1/models").json()["data"]
        answers = [words(http, words=[SIGN]), cut(http, [CAR_BOX])]
    assert health["ready"]
    assert all("make models" in reason for reason in health["missing"].values())
    assert [model["id"] for model in models if "make models" in model["missing"]] == [
        "char-sam",
        "slf-cars",
        "sam-mobile",
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_weights")
        assert "make models" in answer.json()["detail"]
