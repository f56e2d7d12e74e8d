"""The ML-backend protocol of Label Studio, by the bodies that Label Studio sends."""

import base64
import io
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gesso_core.annotate.char_sam.label_studio import unpack_brush
from gesso_services.gateway.labeling_config import read_config
from PIL import Image, ImageDraw, ImageFont

pytestmark = pytest.mark.broker

WIDTH, HEIGHT = 160, 80
CONFIG = """<View>
  <Image name="image" value="$ocr"/>
  <BrushLabels name="label" toName="image">
    <Label value="word"/><Label value="character"/>
  </BrushLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="word"/></KeyPointLabels>
</View>"""
POLYGONS = CONFIG.replace("BrushLabels", "PolygonLabels")
OTHER_LABELS = CONFIG.replace('"word"', '"cat"').replace('"character"', '"dog"')


def address(word: str) -> str:
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210))
    font = ImageFont.load_default(44)
    ImageDraw.Draw(image).text((80, 40), word, (20, 30, 80), font, anchor="mm")
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(*pictures: str, config: str = CONFIG, context: Any = None) -> dict[str, Any]:
    """What Label Studio posts for tasks that want predictions."""
    return {
        "tasks": [{"id": i, "data": {"ocr": one}} for i, one in enumerate(pictures)],
        "model_version": "",
        "project": "1.1700000000",
        "label_config": config,
        "params": {"login": None, "password": None, "context": context},
    }


def predict(http: httpx2.Client, *pictures: str, **options: Any) -> Any:
    answer = http.post("/label-studio/predict", json=asked(*pictures, **options))
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_it_is_up(label: httpx2.Client) -> None:
    assert label.get("/label-studio/health").json()["status"] == "UP"


def test_a_project_whose_interface_takes_masks_is_told_the_model_version(
    label: httpx2.Client,
) -> None:
    body = {"project": "1.17", "schema": CONFIG, "hostname": "http://ls", "access_token": "t"}
    answer = label.post("/label-studio/setup", json=body)
    assert answer.json() == {"model_version": "char-sam"}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("<View", "no XML"),
        ("<View/>", "no <Image>"),
        ('<View><Image name="image" value="$image"/></View>', "BrushLabels or PolygonLabels"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "document type"),
    ],
)
def test_an_interface_that_could_not_show_masks_is_refused_with_an_example(
    label: httpx2.Client, config: str, word: str
) -> None:
    answer = label.post("/label-studio/setup", json={"project": "1", "schema": config})
    assert (answer.status_code, answer.json()["field"]) == (422, "schema")
    assert word in answer.json()["detail"]


def test_every_task_gets_the_words_and_characters_of_its_picture(label: httpx2.Client) -> None:
    first, second = predict(label, address("OPEN"), address("EXIT"))
    assert first["model_version"] == "char-sam"
    for prediction, word in ((first, "OPEN"), (second, "EXIT")):
        texts = [region["meta"]["text"][0] for region in prediction["result"]]
        assert texts[:1] == [word]
        assert set(texts[1:]) <= set(word)
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"]) == ("label", "image")
            assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
            mask = unpack_brush(region["value"]["rle"], (HEIGHT, WIDTH))
            assert mask.any()


def test_polygons_are_drawn_where_the_project_has_those(label: httpx2.Client) -> None:
    (prediction,) = predict(label, address("OPEN"), config=POLYGONS)
    assert {region["type"] for region in prediction["result"]} == {"polygonlabels"}


def test_a_project_without_labels_for_text_gets_no_regions(label: httpx2.Client) -> None:
    (prediction,) = predict(label, address("OPEN"), config=OTHER_LABELS)
    assert prediction["result"] == []


def tool(kind: str, label: str, **value: float) -> dict[str, Any]:
    return {
        "type": kind,
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "is_positive": True,
        "value": {**value, kind: [label]},
    }


def test_a_click_of_a_smart_tool_is_answered_with_a_brush(label: httpx2.Client) -> None:
    click = tool("keypointlabels", "cat", x=50, y=50, width=0.5)
    box = tool("rectanglelabels", "cat", x=10, y=10, width=80, height=80)
    for drawn in ([click], [box], [click, box]):
        context = {"result": drawn}
        (prediction,) = predict(label, address("OPEN"), config=OTHER_LABELS, context=context)
        (region,) = prediction["result"]
        assert region["value"]["brushlabels"] == ["cat"]
        assert unpack_brush(region["value"]["rle"], (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"tasks": []}, "tasks", "at least 1 item"),
        ({"label_config": "<View/>"}, "label_config", "no <Image>"),
        ({"params": {"context": {"result": [tool("keypointlabels", "word", x=500, y=1)]}}},
         "params.context.result.0.value.x", "percent"),
        ({"params": {"context": {"result": [tool("ellipselabels", "word", x=50, y=50)]}}},
         "params.context.result.0.type", "KeyPointLabels or RectangleLabels"),
        ({"label_config": POLYGONS,
          "params": {"context": {"result": [tool("keypointlabels", "word", x=50, y=50)]}}},
         "label_config", "no BrushLabels"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_predicted_is_refused_by_the_field(
    label: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    answer = label.post("/label-studio/predict", json=asked(address("OPEN")) | change)
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
    assert word in answer.json()["detail"]


def test_a_bad_picture_gets_an_empty_prediction_and_takes_no_other_with_it(
    label: httpx2.Client,
) -> None:
    body = asked("http://x/a.png", address("OPEN"), "data:image/png;base64,AAAA", "/data/upload/1")
    body["tasks"].append({"id": 9, "data": {"other": 1}})
    answer = label.post("/label-studio/predict", json=body)
    assert answer.status_code == 200, answer.text
    far, good, broken, upload, absent = answer.json()["results"]
    assert good["result"]
    assert "error" not in good
    for prediction, index, word in (
        (far, 0, "no address over the network"),
        (broken, 2, "do not begin like a picture"),
        (upload, 3, "GESSO_GATEWAY_LABEL_STUDIO_UPLOADS"),
        (absent, 4, "no text under 'ocr'"),
    ):
        assert (prediction["result"], prediction["score"]) == ([], 0.0)
        assert prediction["error"].startswith(f"tasks.{index}.data.ocr: ")
        assert word in prediction["error"]


def test_what_is_not_done_in_time_gets_no_prediction_so_that_it_is_asked_for_again(
    start_on_annotator: Any,
) -> None:
    gateway = start_on_annotator(label_studio_deadline_s=0.001)
    with httpx2.Client(base_url=gateway.url, timeout=30) as http:
        alone = http.post("/label-studio/predict", json=asked(address("OPEN")))
        assert alone.status_code == 504, alone.text
        assert alone.json()["code"] == "deadline_exceeded"
        late, bad = predict(http, address("OPEN"), "http://x/a.png")
    assert set(late) == {"error"}
    assert "not labelled within 0.001 s" in late["error"]
    assert bad["result"] == []


def test_files_of_label_studio_are_read_from_the_folders_that_both_servers_see(
    start_on_annotator: Any, tmp_path: Path
) -> None:
    uploads, shared = tmp_path / "media" / "upload", tmp_path / "shared"
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210)).save(file, "PNG")
    picture = file.getvalue()
    for path in (uploads / "3" / "ab12-a.png", shared / "two words" / "a.png", tmp_path / "a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    (shared / "large.png").write_bytes(bytes(2000))
    (shared / "link.png").symlink_to(tmp_path / "a.png")
    gateway = start_on_annotator(
        label_studio_uploads=uploads, label_studio_local_files=shared, max_upload_bytes=1024
    )
    local = "/data/local-files/?d="
    seen = ("/data/upload/3/ab12-a.png", f"http://ls:8080/x{local}two%20words/a.png")
    hidden = (
        "/data/upload/../../a.png", f"{local}..%2Fa.png", f"{local}{tmp_path}/a.png",
        f"{local}link.png", f"{local}two%20words", f"{local}none.png", f"{local}%00",
        f"{local}{'a' * 5000}",
    )  # fmt: skip
    with httpx2.Client(base_url=gateway.url, timeout=60) as http:
        *found, large = predict(http, *seen, *hidden, f"{local}large.png")
    assert "over the limit of 1,024" in large["error"]
    assert not any("error" in prediction for prediction in found[:2])
    for prediction in found[2:]:
        assert prediction["result"] == []
        assert "is no file in the folder" in prediction["error"]


def test_what_people_do_in_label_studio_is_heard_and_ignored(label: httpx2.Client) -> None:
    answer = label.post("/label-studio/webhook", json={"action": "TASKS_CREATED", "tasks": []})
    assert (answer.status_code, answer.json()) == (200, {"status": "ignored"})


@pytest.mark.parametrize(
    ("controls", "text", "brush"),
    [
        ('<BrushLabels name="a" toName="i"><Label value="cat"/></BrushLabels>'
         '<PolygonLabels name="b" toName="i"><Label value="word"/></PolygonLabels>', "b", "a"),
        ('<BrushLabels name="a" toName="x,i"><Label value="Wort" alias="word"/></BrushLabels>',
         "a", "a"),
        ('<BrushLabels name="a" toName="x"><Label value="word"/></BrushLabels>'
         '<BrushLabels name="b" toName="i"><Label value="dog"/></BrushLabels>', None, "b"),
        ('<brushlabels name="a" toName="i"><label value="word"/></brushlabels>', "a", "a"),
    ],
    ids=["labels decide", "list and alias", "another picture", "small letters"],
)  # fmt: skip
def test_the_control_is_the_one_that_takes_the_labels(
    controls: str, text: str | None, brush: str
) -> None:
    config = read_config(f'<View><Image name="i" value="$image"/>{controls}</View>', "schema")
    assert (config.for_text and config.for_text.name) == text
    found = config.brush_for("cat")
    assert found is not None
    assert found.name == brush


def test_a_closed_server_takes_the_key_as_a_password(start_gateway: Any) -> None:
    gateway = start_gateway(api_keys="sesame")  # where nobody annotates
    body = {"project": "1", "schema": CONFIG}
    with httpx2.Client(base_url=gateway.url, timeout=30) as http:
        answer = http.post("/label-studio/setup", json=body)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Basic"
        assert http.post("/label-studio/setup", json=body, auth=("x", "no")).status_code == 401
        let_in = http.post("/label-studio/setup", json=body, auth=("x", "sesame"))
    assert (let_in.status_code, let_in.json()["code"]) == (404, "unknown_model")
    assert "no model of this server can label the characters of words" in let_in.json()["detail"]
