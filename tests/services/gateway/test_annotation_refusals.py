"""What is wrong with an annotation is said at the door, by the name of the field; what is merely
unusual about a picture is taken.
"""

import base64
import io
import json
from typing import Any
from uuid import uuid4

import httpx2
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.broker

SEGMENT, TEXT, CARS = (f"/v1/annotations/{what}" for what in ("segment", "text", "cars"))
WIDTH, HEIGHT = 120, 80
CLICK: dict[str, Any] = {"points": [[60, 40]], "labels": [1]}
WORD: dict[str, Any] = {"text": "HI", "polygon": [[20, 20], [100, 20], [100, 60], [20, 60]]}
CAR: dict[str, Any] = {"box": [30, 20, 90, 60]}
CALIBRATION = """P2: 100 0 60 0 0 100 40 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


def picture(picture_format: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (200, 190, 180)).convert(mode).save(
        file, picture_format, **options
    )
    return file.getvalue()


def deep_picture() -> bytes:
    """16 bits per sample."""
    file = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def turned_picture() -> bytes:
    """Stored upright, with a note that it has to be turned: 80 wide, 120 high when it stands."""
    note = Image.Exif()
    note[0x0112] = 6
    return picture("JPEG", exif=note)


def send(
    http: httpx2.Client, path: str, image: bytes | None = None, files: Any = None, **fields: Any
) -> httpx2.Response:
    data = {
        name: json.dumps(value) if isinstance(value, list | dict) else value
        for name, value in fields.items()
    }
    parts = {"image": ("x.png", picture() if image is None else image), **(files or {})}
    return http.post(path, files=parts, data=data)


def refused(answer: httpx2.Response, field: str, word: str, status: int = 422) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["field"] == body["error"]["param"] == field, body
    assert word in body["detail"], body["detail"]
    assert len(body["detail"]) < 600


@pytest.mark.parametrize(
    ("prompts", "field", "word"),
    [
        ([], "prompts", "at least 1 item"),
        ([CLICK] * 65, "prompts", "at most 64 items"),
        ("no list", "prompts", "JSON"),
        ([{}], "prompts.0", "an empty prompt"),
        ([CLICK, {"points": [[1, 1]], "labels": []}], "prompts.1", "1 points but 0 labels"),
        ([{"points": [[1, 1]], "labels": [2]}], "prompts.0.labels.0", "0 or 1"),
        ([{"points": [[1]], "labels": [1]}], "prompts.0.points.0.1", "required"),
        ([{"box": [40, 40, 20, 60]}], "prompts.0", "no area"),
        ([{"box": [1, 2, 3]}], "prompts.0.box.3", "required"),
        ([CLICK, {"box": [500, 0, 600, 50]}], "prompts.1.box", "outside the 120x80 picture"),
        ([{"points": [[60, 90]], "labels": [1]}], "prompts.0.points", "outside the 120x80"),
        ([{"box": [0, 0, 5, 1e9]}], "prompts.0.box.3", "less than or equal"),
        ([{"circle": 1}], "prompts.0.circle", "not permitted"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_prompt_is_refused_by_its_place(
    label: httpx2.Client, prompts: Any, field: str, word: str
) -> None:
    refused(send(label, SEGMENT, prompts=prompts), field, word)


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"text": ""}, "words.0.text", "at least 1 character"),
        ({"text": "   "}, "words.0.text", "empty"),
        ({"polygon": WORD["polygon"][:3]}, "words.0.polygon", "at least 4 items"),
        ({"polygon": [[300, 0], [400, 0], [400, 40], [300, 40]]}, "words.0.polygon", "outside"),
        ({"polygon": [[20, 20]] * 4}, "words.0.polygon", "at least 2x2"),
        ({"polygon": [[20, "a"], *WORD["polygon"][1:]]}, "words.0.polygon.0.1", "number"),
        ({"language": "en"}, "words.0.language", "not permitted"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_word_is_refused_by_its_place(
    label: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    refused(send(label, TEXT, words=[WORD | change]), field, word)


def test_more_words_than_a_message_holds_are_refused_by_their_field(label: httpx2.Client) -> None:
    bent = WORD["polygon"] + [[20 + i, 20] for i in range(16)]
    refused(send(label, TEXT, words=[{"text": "a", "polygon": bent}] * 501), "words", "10,020 corn")
    refused(send(label, TEXT, words=[WORD | {"text": "H" * 400}] * 51), "words", "20,400 char")


def test_a_word_that_reaches_far_beyond_the_picture_is_labelled(label: httpx2.Client) -> None:
    far = [[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]]
    answer = send(label, TEXT, words=[WORD | {"polygon": far}])
    assert answer.status_code == 200, answer.text
    assert "clipped" in answer.json()["words"][0]["flags"]


def test_what_is_missing_is_named_and_nothing_else_repeated(label: httpx2.Client) -> None:
    answer = send(label, SEGMENT)
    refused(answer, "prompts", "required")
    assert "given" not in answer.json()["detail"]


def test_a_nan_is_no_coordinate(label: httpx2.Client) -> None:
    answer = send(label, SEGMENT, prompts='[{"points": [[NaN, 1]], "labels": [1]}]')
    refused(answer, "prompts.0.points.0.0", "finite")


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"refine": "magic"}, "refine", "'box', 'glyph' or 'colour'"),
        ({"min_score": "2"}, "min_score", "less than or equal to 1"),
        ({"wait": "maybe"}, "wait", "boolean"),
        ({"url": "http://example.com/a.png"}, "url", "not permitted"),
        ({"model": "sam-mobile"}, "model", "char-sam"),
    ],
)
def test_a_wrong_option_is_named(
    label: httpx2.Client, fields: dict[str, Any], field: str, word: str
) -> None:
    status = 404 if field == "model" else 422
    refused(send(label, TEXT, words=[WORD], **fields), field, word, status)


@pytest.mark.parametrize("path", [SEGMENT, TEXT, CARS])
@pytest.mark.parametrize("data", [b"", b"junk", picture()[:80]], ids=["empty", "junk", "cut off"])
def test_what_is_no_picture_is_refused(label: httpx2.Client, path: str, data: bytes) -> None:
    more = {
        SEGMENT: {"prompts": [CLICK]},
        TEXT: {"words": [WORD]},
        CARS: {"prompts": [CAR], "files": {"calibration": ("c.txt", CALIBRATION)}},
    }
    answer = send(label, path, data, **more[path])
    refused(answer, "image", "picture")
    assert answer.json()["code"] == "unreadable_image"


def drive(http: httpx2.Client, calibration: Any = CALIBRATION, **more: Any) -> httpx2.Response:
    files = {"calibration": ("c.txt", calibration)} if calibration is not None else {}
    if "points" in more:
        files["points"] = ("p.bin", more.pop("points"))
    return send(http, CARS, files=files, **({"prompts": [CAR]} | more))


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"calibration": None}, "calibration", "required"),
        (
            {"calibration": CALIBRATION.replace("P2: 100 ", "P2: ")},
            "calibration",
            "12 numbers, got 11",
        ),
        (
            {"calibration": CALIBRATION.replace("R0_rect", "R1")},
            "calibration",
            "R0_rect is missing",
        ),
        ({"calibration": CALIBRATION.replace("100", "x")}, "calibration", "no number"),
        ({"calibration": b"\xff\xfe\x00"}, "calibration", "are no text"),
        ({"calibration": CALIBRATION + "#" * 10_000}, "calibration", "1 to 10,000"),
        ({"points": b"\0" * 17}, "points", "16 bytes per point"),
        ({"prompts": []}, "prompts", "at least 1 item"),
        ({"prompts": [{}]}, "prompts.0", "a box or by a point"),
        ({"prompts": [CAR | {"point": [1, 1]}]}, "prompts.0", "one of them"),
        ({"prompts": [{"box": [0, 90, 20, 99]}]}, "prompts.0.box", "outside the 120x80"),
        ({"prompts": [CAR, {"point": [130, 1]}]}, "prompts.1.point", "outside the 120x80"),
        ({"driving_side": "up"}, "driving_side", "'right' or 'left'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_frame_is_refused_by_the_field(
    label: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    refused(drive(label, **change), field, word)


def inline(data: bytes) -> dict[str, str]:
    text = base64.b64encode(data).decode()
    return {"kind": "inline", "data": text, "media_type": "image/png"}


@pytest.mark.parametrize(
    ("kind", "change", "field", "word"),
    [
        ("text", {"words": [WORD | {"polygon": [[300, 0], [400, 0], [400, 9], [300, 9]]}]},
         "request.words.0.polygon", "outside"),
        ("text", {"image": inline(b"junk")}, "request.image", "do not begin like a picture"),
        ("text", {"min_score": "0.5"}, "request.min_score", "valid number"),
        ("text", {"name": "../../etc/passwd"}, "request.name", "match pattern"),
        ("text", {"name": ".."}, "request.name", "match pattern"),
        ("text", {"name": "a\nb.png"}, "request.name", "match pattern"),
        ("cars", {"calibration": "nothing"}, "request.calibration", "missing"),
        ("cars", {"points": inline(b"\0" * 15)}, "request.points", "16 bytes per point"),
        ("cars", {"prompts": [{"box": [200, 0, 210, 9]}]}, "request.prompts.0.box", "outside"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_job_that_is_put_passes_the_same_door(
    label: httpx2.Client, kind: str, change: dict[str, Any], field: str, word: str
) -> None:
    requests: dict[str, dict[str, Any]] = {
        "text": {"model": "char-sam", "image": inline(picture()), "words": [WORD]},
        "cars": {
            "model": "slf-cars",
            "image": inline(picture()),
            "calibration": CALIBRATION,
            "prompts": [CAR],
        },
    }
    body = {"kind": f"annotate-{kind}", "request": requests[kind] | change}
    refused(label.put(f"/v1/jobs/put-{uuid4().hex}", json=body), field, word)


def test_a_job_that_is_put_is_worked_on(label: httpx2.Client) -> None:
    name = f"put-{uuid4().hex}"
    request = {"model": "char-sam", "image": inline(picture()), "words": [WORD], "name": "a.png"}
    answer = label.put(f"/v1/jobs/{name}", json={"kind": "annotate-text", "request": request})
    assert answer.status_code == 202, answer.text
    label.get(f"/v1/jobs/{name}/events")
    assert label.get(f"/v1/jobs/{name}/result").json()["name"] == "a.png"


@pytest.mark.parametrize(
    "data",
    [picture("JPEG", "CMYK"), deep_picture(), picture("PNG", "P"), picture("WEBP")],
    ids=["cmyk", "16 bit", "palette", "webp"],
)
def test_unusual_pictures_are_taken(label: httpx2.Client, data: bytes) -> None:
    body = send(label, SEGMENT, data, prompts=[CLICK]).json()
    assert (body["width"], body["height"]) == (WIDTH, HEIGHT)


def test_coordinates_count_in_the_picture_as_it_stands_upright(label: httpx2.Client) -> None:
    low = [{"points": [[40, 110]], "labels": [1]}]
    body = send(label, SEGMENT, turned_picture(), prompts=low).json()
    assert (body["width"], body["height"]) == (HEIGHT, WIDTH)
    aside = [{"points": [[110, 40]], "labels": [1]}]
    refused(send(label, SEGMENT, turned_picture(), prompts=aside), "prompts.0.points", "80x120")


def test_a_text_too_long_for_its_box_is_refused_in_the_answer(label: httpx2.Client) -> None:
    (word,) = send(label, TEXT, words=[WORD | {"text": "H" * 90}]).json()["words"]
    assert word["refused"].startswith("text does not fit")


def test_a_script_that_no_font_has_is_named_by_a_flag(label: httpx2.Client) -> None:
    (word,) = send(label, TEXT, words=[WORD | {"text": "अ"}]).json()["words"]
    flags = {flag for character in word["characters"] for flag in character["flags"]}
    assert "no_glyph" in flags | set(word["flags"])


def test_a_box_on_the_sky_has_no_lidar_points_and_says_so(label: httpx2.Client) -> None:
    far_below = np.array([[5.0, 0.0, -1.7, 1.0]] * 50, "<f4").tobytes()
    sky = [{"box": [30, 1, 90, 20]}]
    (outcome,) = drive(label, points=far_below, prompts=sky).json()["objects"]
    assert outcome["refused"] or "no_lidar" in outcome["car"]["flags"]


@pytest.mark.parametrize("name", ["../../x.png", "C:\\Users\\x.png", "x.png"])
def test_of_a_file_name_only_the_last_part_stays(label: httpx2.Client, name: str) -> None:
    files = {"image": (name, picture())}
    body = label.post(TEXT, files=files, data={"words": json.dumps([WORD])}).json()
    assert body["name"] == "x.png"


def test_a_job_that_is_no_annotation_has_none_of_its_pictures(label: httpx2.Client) -> None:
    for path in ("/v1/annotations/nobody/overlay", "/v1/jobs/nobody/export?format=coco"):
        assert label.get(path).status_code == 404
    assert label.get("/v1/annotations/nobody/secrets").status_code == 422
    refused(label.get("/v1/jobs/nobody/export?format=docx"), "format", "'coco'")
