"""Bad input at the door: the right status, a sentence that says what to change, no harm done."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from gesso_core.pipelines.pictures import encode_picture
from PIL import Image

pytestmark = pytest.mark.broker

GENERATIONS = "/v1/images/generations"
RECONSTRUCTIONS = "/v1/images/reconstructions"
APPLE = {"model": "sana-tiny", "prompt": "a red apple", "seed": 7}


@pytest.fixture(autouse=True)
def unharmed(http: httpx2.Client) -> Iterator[None]:
    """Whatever a test sends, the service paints afterwards."""
    yield
    assert http.post(GENERATIONS, json=APPLE).status_code == 200


def refused(answer: httpx2.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert body["error"]["message"] == body["detail"]
    for word in words:
        assert word in body["detail"], body["detail"]
    assert "Traceback" not in answer.text
    return body


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "   "}, "prompt", "match pattern"),
        ({"prompt": "x" * 100_000}, "prompt", "at most 4000 characters"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": "2"}, "n", "valid integer"),
        ({"size": "63x64"}, "size", "multiple of 8"),
        ({"size": "big"}, "size", "match pattern"),
        ({"size": "0x0"}, "size", "match pattern"),
        ({"size": "4096x4096"}, "size", "at most 16,384"),
        ({"size": "99999x99999"}, "size", "from 32 to 4096"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "no room"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"guidance_scale": 31}, "guidance_scale", "less than or equal to 30"),
        ({"sampler": "magic"}, "sampler", "flow-dpm-solver"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"negative_prompt": "x" * 5000}, "negative_prompt", "at most 4000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    http: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    body = refused(http.post(GENERATIONS, json=APPLE | change), 422, word)
    assert body["field"] == body["error"]["param"] == field
    assert len(body["detail"]) < 400


def test_an_unknown_model_is_404_with_those_that_exist(http: httpx2.Client) -> None:
    body = refused(http.post(GENERATIONS, json=APPLE | {"model": "sanna"}), 404, "sana-tiny")
    assert body["code"] == "unknown_model"


def test_an_autoencoder_cannot_paint(http: httpx2.Client) -> None:
    refused(http.post(GENERATIONS, json=APPLE | {"model": "dcae-tiny"}), 404, "dcae-tiny")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../b", "/etc/passwd", "a\0b", "a" * 500])
def test_a_path_is_not_a_model_name(http: httpx2.Client, name: str) -> None:
    refused(http.post(GENERATIONS, json=APPLE | {"model": name}), 422, "model")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b'{"prompt": "\xc3\x28"}', b"a=1"],
    ids=repr,
)
def test_a_body_that_is_not_an_object_in_utf8_json_is_refused(
    http: httpx2.Client, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post(GENERATIONS, content=content, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "seed": 1e400}',
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=["lone surrogate", "infinity", "nan", "surrogate name", "deep nesting"],
)
def test_json_that_python_takes_and_others_do_not_is_refused(
    http: httpx2.Client, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post(GENERATIONS, content=content, headers=headers)
    assert answer.status_code in (400, 422), answer.text


def test_a_body_over_the_limit_is_413_and_says_the_limit(http: httpx2.Client) -> None:
    body = refused(http.post(GENERATIONS, json=APPLE | {"user": "x" * 300_000}), 413, "262,144")
    assert body["error"]["type"] == "invalid_request_error"


def test_a_chunked_body_over_the_limit_is_413_too(http: httpx2.Client) -> None:
    chunks = (b"x" * 65536 for _ in range(8))
    headers = {"Content-Type": "application/json"}
    refused(http.post(GENERATIONS, content=chunks, headers=headers), 413, "262,144")


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/jobs/../../etc", "/page/../app.py", "/x"])
def test_an_unknown_route_is_404_in_json(http: httpx2.Client, path: str) -> None:
    assert refused(http.get(path), 404)["error"]["type"] == "invalid_request_error"


def test_the_page_folder_gives_nothing_but_the_page(http: httpx2.Client) -> None:
    for path in ("/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/....//app.py"):
        assert http.get(path).status_code == 404


def test_a_wrong_method_is_405_with_those_allowed(http: httpx2.Client) -> None:
    assert http.get(GENERATIONS).headers["allow"] == "POST"
    answer = http.patch("/v1/jobs/one")
    refused(answer, 405)
    assert answer.headers["allow"] == "GET, PUT, DELETE"


@pytest.mark.parametrize("job_id", ["../secret", "UPPER", "a.b", "a" * 65, "a b", "a*", "a>"])
def test_a_job_id_that_could_not_be_a_subject_is_refused(http: httpx2.Client, job_id: str) -> None:
    quoted = job_id.replace("/", "%2F").replace(" ", "%20")
    for path in (f"/v1/jobs/{quoted}", f"/v1/images/{quoted}/content"):
        assert http.get(path).status_code in (404, 422)


def send(http: httpx2.Client, data: bytes, **fields: str) -> httpx2.Response:
    return http.post(RECONSTRUCTIONS, files={"image": ("../../x.png", data)}, data=fields)


def png(width: int, height: int) -> bytes:
    """A well-formed PNG that claims a size and carries one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + 3 * width))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "PNG, JPEG or WebP"),
        (b"hello, world", "PNG, JPEG or WebP"),
        (gif(), "PNG, JPEG or WebP"),
        (b"http://example.com/a.png", "PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG or WebP"),
        (encode_picture(np.zeros((64, 64, 3), np.uint8))[:60], "not a whole picture"),
        (png(50_000, 50_000), "pixels"),
        (png(6_000, 6_000), "36,000,000 pixels"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "not a whole picture"),
    ],
    ids=["empty", "text", "gif", "url", "svg", "truncated", "bomb", "large", "broken jpeg"],
)
def test_what_is_not_an_allowed_picture_is_refused(
    http: httpx2.Client, data: bytes, word: str
) -> None:
    body = refused(send(http, data), 422, word)
    assert body["code"] == "unreadable_image"
    assert body["field"] == "image"


def test_an_upload_over_the_limit_is_413(http: httpx2.Client) -> None:
    refused(send(http, b"\x89PNG\r\n\x1a\n" + b"\0" * (17 * 2**20)), 413, "16,777,216")


def test_an_upload_without_a_file_names_the_field(http: httpx2.Client) -> None:
    answer = http.post(RECONSTRUCTIONS, data={"image": "http://example.com/a.png"})
    assert refused(answer, 422)["field"] == "image"


def test_a_full_queue_is_429_and_says_when_to_come_back(start_gateway: Any) -> None:
    gateway = start_gateway(max_queue_depth=2, depth_ttl_s=0)
    with httpx2.Client(base_url=gateway.url) as http:
        answer = http.post(GENERATIONS, json=APPLE | {"n": 3})
    body = refused(answer, 429, "takes 2")
    assert body["error"]["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) > 0


def test_a_key_may_only_have_so_many_requests_open(start_gateway: Any) -> None:
    gateway = start_gateway(max_requests_per_key=1)
    slow = APPLE | {"prompt": "slowly, a snail", "stream": True, "steps": 20}
    with httpx2.Client(base_url=gateway.url) as http:
        with http.stream("POST", GENERATIONS, json=slow) as answer:
            chunks = answer.iter_text()  # closed, and the stream with it, once nobody holds it
            assert next(chunks)
            refused(http.post(GENERATIONS, json=APPLE), 429, "1 requests open")
        for _ in range(100):
            again = http.post(GENERATIONS, json=APPLE)
            if again.status_code == 200:
                break
        assert again.status_code == 200


def test_a_closed_server_wants_one_of_its_keys(start_gateway: Any) -> None:
    gateway = start_gateway(api_keys="first, second")
    with httpx2.Client(base_url=gateway.url) as http:
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = http.post(GENERATIONS, json=APPLE, headers=headers)
            body = refused(answer, 401, "Authorization: Bearer")
            assert body["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "first" not in answer.text
        for path in (
            *("/v1/models", "/v1/jobs", "/v1/jobs/one", "/v1/images/one/content"),
            *("/v1/videos/one", "/v1/videos/one/content"),
        ):
            assert http.get(path).status_code == 401
        for path in ("images/variations", "chat/completions", "judgements", "videos"):
            assert http.post(f"/v1/{path}", json={}).status_code == 401
        key = {"Authorization": "Bearer second"}
        assert http.post(GENERATIONS, json=APPLE, headers=key).status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_the_same_idempotency_key_of_two_callers_means_two_jobs(start_gateway: Any) -> None:
    gateway = start_gateway(api_keys="first,second")
    made = []
    with httpx2.Client(base_url=gateway.url) as http:
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "shared"}
            answer = http.post(GENERATIONS, json={"prompt": "a red apple"}, headers=headers)
            made.append(answer.json()["data"][0]["job_id"])
    assert made[0] != made[1]
