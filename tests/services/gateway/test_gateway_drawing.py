"""Models that draw tokens over HTTP: pictures, variations, videos, judgements, the best of many."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx2
import numpy as np
import openai
import pytest
from gesso_contracts.limits import JOB_MESSAGE_BYTES
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_core.pipelines.videos import decode_video
from gesso_services.gateway.uploads import INLINE_BYTES_PER_CALL, INLINE_BYTES_PER_JOB

pytestmark = pytest.mark.broker

GENERATIONS = "/v1/images/generations"
VARIATIONS = "/v1/images/variations"
JUDGEMENTS = "/v1/judgements"
VIDEOS = "/v1/videos"
APPLE: dict[str, Any] = {"prompt": "a red apple", "seed": 7}
WHITE = encode_picture(np.full((64, 64, 3), 255, np.uint8))


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels_of(data: dict[str, Any]) -> Pixels:
    return decode_picture(base64.b64decode(data["b64_json"]))


def blue(seed: int) -> str:
    """A picture whose score is seed / 255."""
    return base64.b64encode(encode_picture(np.full((8, 8, 3), seed, np.uint8))).decode()


def events_of(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in httpx2.EventSource(answer):
        yield event.event, json.loads(event.data)


def refused(answer: httpx2.Response, status: int, field: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["field"] == body["error"]["param"] == field, body
    for word in words:
        assert word in body["detail"], body["detail"]


@pytest.mark.parametrize(
    ("model", "service"),
    [("sana-tiny", "diffusion"), ("hart-tiny", "autoregressive"), ("vilau-tiny", "autoregressive")],
)
def test_a_picture_goes_to_the_service_of_its_model(
    http: httpx2.Client, model: str, service: str
) -> None:
    body = http.post(GENERATIONS, json=APPLE | {"model": model}).json()
    assert body["metadata"]["model"] == model
    assert pixels_of(body["data"][0])[0, 0, 2] == 7
    job = http.get(f"/v1/jobs/{body['data'][0]['job_id']}").json()
    assert (job["service"], job["kind"]) == (service, "generate-image")


def test_the_number_of_previews_fits_the_steps_of_the_model(http: httpx2.Client) -> None:
    wish = APPLE | {"model": "hart-tiny", "stream": True, "partial_images": 3}
    wish["prompt"] = "slowly, a red apple"
    with http.stream("POST", GENERATIONS, json=wish) as answer:
        seen = list(events_of(answer))
    shown = [data["step"] for name, data in seen if name == "image_generation.partial_image"]
    assert 1 <= len(shown) <= 4
    assert shown == sorted(set(shown))
    assert seen[-1][1]["total_steps"] == 4


def test_what_the_service_refuses_comes_back_with_its_field(http: httpx2.Client) -> None:
    wish = APPLE | {"model": "hart-tiny", "negative_prompt": "worms"}
    refused(http.post(GENERATIONS, json=wish), 422, "negative_prompt", "leave it empty")


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"best_of": 17}, "best_of", "less than or equal to 16"),
        ({"best_of": 2, "n": 3}, "best_of", "less than the 3 pictures"),
        ({"judge": "vilau-tiny"}, "judge", "nothing to choose from"),
        ({"seed": 2**63 - 2, "best_of": 4}, "seed", "no room for 4"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_field(
    http: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    refused(http.post(GENERATIONS, json=APPLE | change), 422, field, word)


def test_a_judge_that_cannot_see_is_refused_before_anything_is_drawn(http: httpx2.Client) -> None:
    wish = APPLE | {"best_of": 4, "judge": "hart-tiny"}
    refused(http.post(GENERATIONS, json=wish), 404, "judge", "cannot judge", "use vilau-tiny")


# ---------------------------------------------------------------- the best of many


@pytest.mark.parametrize("model", ["sana-tiny", "hart-tiny"])
def test_the_best_of_many_come_back_in_order_of_their_scores(
    http: httpx2.Client, model: str
) -> None:
    body = http.post(GENERATIONS, json=APPLE | {"model": model, "best_of": 5, "n": 2}).json()
    assert [one["seed"] for one in body["data"]] == [11, 10]
    assert [one["metadata"]["score"] for one in body["data"]] == [11 / 255, 10 / 255]
    assert body["data"][0]["metadata"]["judge"] == "vilau-tiny"
    assert [int(pixels_of(one)[0, 0, 2]) for one in body["data"]] == [11, 10]


def test_a_stream_of_the_best_tells_all_and_completes_the_chosen(http: httpx2.Client) -> None:
    wish = APPLE | {"best_of": 4, "n": 2, "stream": True}
    with http.stream("POST", GENERATIONS, json=wish) as answer:
        seen = list(events_of(answer))
    assert {data["index"] for name, data in seen if name.endswith("progress")} == {0, 1, 2, 3}
    done = [data for name, data in seen if name == "image_generation.completed"]
    assert [(one["rank"], one["index"], one["seed"]) for one in done] == [(0, 3, 10), (1, 2, 9)]
    assert done[0]["score"] > done[1]["score"]
    assert seen[-1][1] is done[-1]


def test_a_judge_that_fails_is_told(http: httpx2.Client) -> None:
    wish = APPLE | {"model": "hart-tiny", "prompt": "too large", "best_of": 2}
    refused(http.post(GENERATIONS, json=wish), 507, None, "judge fewer")
    with http.stream("POST", GENERATIONS, json=wish | {"stream": True}) as answer:
        *_, (name, data) = events_of(answer)
    assert (name, data["error"]["code"]) == ("error", "out_of_memory")


def test_a_prompt_too_long_for_the_judge_is_refused_before_anything_is_drawn(
    http: httpx2.Client,
) -> None:
    def jobs() -> set[str]:
        return {job["id"] for job in http.get("/v1/jobs?limit=100").json()["data"]}

    before = jobs()
    wish = APPLE | {"prompt": "x " * 1500, "best_of": 2}
    for stream in (False, True):
        answer = http.post(GENERATIONS, json=wish | {"stream": stream})
        refused(answer, 422, "prompt", "shorten the prompt")
    assert not jobs() - before
    del wish["best_of"]
    assert http.post(GENERATIONS, json=wish).status_code == 200


def test_a_judge_that_is_long_in_checking_is_asked_again_with_the_pictures(
    start_gateway: Any,
) -> None:
    gateway = start_gateway(ready_timeout_s=0.3)
    wish = APPLE | {"prompt": "she hesitates", "best_of": 2}
    with httpx2.Client(base_url=gateway.url, timeout=30) as http:
        assert http.post(GENERATIONS, json=wish).json()["data"][0]["seed"] == 8


# ---------------------------------------------------------------- judgements


def test_every_picture_gets_its_score(http: httpx2.Client) -> None:
    images = [blue(51), f"data:image/png;base64,{blue(255)}", blue(0)]
    body = http.post(JUDGEMENTS, json={"prompt": "something blue", "images": images}).json()
    assert body["scores"] == [0.2, 1.0, 0.0]
    assert (body["object"], body["model"]) == ("judgement", "vilau-tiny")


def test_many_large_pictures_are_judged_at_once(http: httpx2.Client) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (352, 352, 3), np.uint8)
    large = base64.b64encode(encode_picture(noise)).decode()
    assert 16 * len(large) * 3 // 4 > INLINE_BYTES_PER_CALL
    answer = http.post(JUDGEMENTS, json={"prompt": "noise", "images": [large] * 16})
    assert len(answer.json()["scores"]) == 16


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"images": []}, "images", "at least 1"),
        ({"images": [blue(1)] * 17}, "images", "at most 16"),
        ({"images": [blue(1), "http://example.com/a.png"]}, "images.1", "opens no other"),
        ({"images": ["file:///etc/passwd"]}, "images.0", "opens no other"),
        ({"images": [blue(1), "####"]}, "images.1", "not base64"),
        ({"images": ["aGVsbG8="]}, "images.0", "do not begin like a picture"),
        ({"images": blue(1)}, "images", "valid list"),
        ({"prompt": " "}, "prompt", "pattern"),
        ({"why": 1}, "why", "not permitted"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_judgement_is_refused_by_field(
    http: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    body = {"prompt": "x", "images": [blue(1)]} | change
    refused(http.post(JUDGEMENTS, json=body), 422, field, word)


def test_only_a_model_that_sees_judges(http: httpx2.Client) -> None:
    body = {"prompt": "x", "images": [blue(1)], "model": "sana-tiny"}
    refused(http.post(JUDGEMENTS, json=body), 404, "model", "cannot judge pictures here")


# ---------------------------------------------------------------- variations


def vary(http: httpx2.Client, image: bytes = WHITE, **fields: Any) -> httpx2.Response:
    return http.post(VARIATIONS, files={"image": ("white.png", image)}, data=fields)


def test_a_variation_keeps_the_first_steps_of_the_picture(http: httpx2.Client) -> None:
    answer = vary(http, model="hart-tiny", prompt="a red apple", keep=1, seed=5, n=2)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["data"]
    assert (first["seed"], second["seed"]) == (5, 6)
    for one in (first, second):
        assert (pixels_of(one)[:16] == 255).all()
        assert (pixels_of(one)[16:, :, 2] == one["seed"]).all()


def kept_rows(answer: httpx2.Response) -> int:
    return int((pixels_of(answer.json()["data"][0]) == 255).all(axis=(1, 2)).sum())


@pytest.mark.parametrize(("model", "rows"), [("hart-tiny", 32), ("vilau-tiny", 0)])
def test_by_default_half_of_the_scales_stay_or_a_model_that_sees_draws_anew(
    http: httpx2.Client, model: str, rows: int
) -> None:
    assert kept_rows(vary(http, model=model)) == rows


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_openais_client_asks_for_variations(client: openai.OpenAI) -> None:
    answer = client.images.create_variation(
        image=io.BytesIO(WHITE), model="hart-tiny", n=1, response_format="b64_json"
    )
    assert answer.data
    assert answer.data[0].b64_json


def test_variations_are_streamed_like_generations(http: httpx2.Client) -> None:
    fields = {"prompt": "slowly, a pear", "stream": "true", "partial_images": "2", "keep": "2"}
    request = http.build_request("POST", VARIATIONS, files={"image": WHITE}, data=fields)
    answer = http.send(request, stream=True)
    names = [name for name, _ in events_of(answer)]
    answer.close()
    assert "image_generation.partial_image" in names
    assert names[-1] == "image_generation.completed"


def test_a_large_picture_is_varied(http: httpx2.Client) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (480, 480, 3), np.uint8)
    large = encode_picture(noise)
    assert len(large) > INLINE_BYTES_PER_JOB
    assert vary(http, large, model="vilau-tiny", keep=0).status_code == 200


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"keep": 4}, "keep", "draws in 4 steps"),
        ({"keep": 0}, "keep", "keep at least 1"),
        ({"keep": -1}, "keep", "greater than or equal to 0"),
        ({"size": "63x63"}, "size", "multiple of 8"),
        ({"size": "640x640"}, "size", "at most"),
        ({"prompt": " "}, "prompt", "pattern"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"mask": "x"}, "mask", "not permitted"),
    ],
    ids=str,
)
def test_a_wrong_variation_is_refused_by_field(
    http: httpx2.Client, fields: dict[str, Any], field: str, word: str
) -> None:
    refused(vary(http, **fields), 422, field, word)


@pytest.mark.parametrize("data", [b"", b"hello", WHITE[:60]], ids=["empty", "text", "truncated"])
def test_what_is_not_a_picture_is_not_varied(http: httpx2.Client, data: bytes) -> None:
    refused(vary(http, data), 422, "image", "picture")


def test_a_model_that_starts_from_noise_alone_cannot_vary(http: httpx2.Client) -> None:
    answer = vary(http, model="sana-tiny")
    refused(answer, 404, "model", "cannot vary a picture here", "hart-tiny or vilau-tiny")


# ---------------------------------------------------------------- videos


def when_done(http: httpx2.Client, video_id: str) -> dict[str, Any]:
    with http.stream("GET", f"/v1/jobs/{video_id}/events") as answer:
        assert list(events_of(answer))
    return dict(http.get(f"{VIDEOS}/{video_id}").json())


def test_a_video_is_begun_looked_at_and_fetched(http: httpx2.Client) -> None:
    wish = {"prompt": "slowly, a kite", "seed": 3, "fps": 5}
    answer = http.post(VIDEOS, json=wish)
    assert answer.status_code == 202, answer.text
    video = answer.json()
    assert answer.headers["location"] == f"{VIDEOS}/{video['id']}"
    assert (video["object"], video["model"]) == ("video", "vila-u-7b-256")
    assert (video["prompt"], video["seed"], video["progress"]) == (wish["prompt"], 3, 0)
    early = http.get(f"{VIDEOS}/{video['id']}/content")
    assert (early.status_code, early.json()["code"]) == (409, "not_finished")
    assert http.get(f"{VIDEOS}/{video['id']}").json()["status"] in ("queued", "in_progress")
    done = when_done(http, video["id"])
    assert (done["status"], done["progress"], done["seconds"]) == ("completed", 100, "1")
    assert (done["size"], done["seed"], done["fps"]) == ("64x32", 3, 5)
    content = http.get(f"{VIDEOS}/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert len(decode_video(content.content, 100)) == 5
    assert http.get(f"/v1/jobs/{video['id']}/result").content == content.content
    picture = http.get(f"/v1/images/{video['id']}/content")
    assert (picture.status_code, picture.json()["code"]) == (409, "other_result")
    late = http.delete(f"{VIDEOS}/{video['id']}")
    assert (late.status_code, late.json()["code"]) == (409, "finished")


@pytest.mark.filterwarnings("ignore:.*Sora API:DeprecationWarning")
def test_openais_client_makes_a_video(client: openai.OpenAI, http: httpx2.Client) -> None:
    more = {"output_format": "gif", "fps": 10, "seed": 4}
    model: Any = "vila-u-7b-256"
    begun = client.videos.create(prompt="a kite", model=model, extra_body=more)
    when_done(http, begun.id)
    video = client.videos.retrieve(begun.id)
    assert (video.status, video.progress, video.seconds) == ("completed", 100, "0.5")
    content = client.videos.download_content(begun.id).read()
    assert len(decode_video(content, 100)) == 5
    slow = client.videos.create(prompt="slowly, a kite", model=model)
    assert client.videos.delete(slow.id).deleted is True
    assert when_done(http, slow.id)["error"]["code"] == "cancelled"
    assert client.videos.retrieve(slow.id).status == "failed"


def test_a_video_is_begun_once_for_one_key(http: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "one kite"}
    ids = {http.post(VIDEOS, json={"prompt": "a"}, headers=headers).json()["id"] for _ in range(2)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({}, "prompt", "required"),
        ({"prompt": "x", "fps": 0}, "fps", "greater than or equal to 1"),
        ({"prompt": "x", "fps": "8"}, "fps", "valid integer"),
        ({"prompt": "x", "seconds": "4"}, "seconds", "not permitted"),
        ({"prompt": "x", "output_format": "avi"}, "output_format", "'mp4', 'webp' or 'gif'"),
        ([], None, "the body"),
    ],
    ids=str,
)
def test_a_wrong_video_is_refused_by_field(
    http: httpx2.Client, body: Any, field: str | None, word: str
) -> None:
    refused(http.post(VIDEOS, json=body), 422, field, word)


HUGE = b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, HUGE],
    ids=lambda content: repr(content[:30]),
)
def test_a_video_that_is_not_json_is_refused(http: httpx2.Client, content: bytes) -> None:
    answer = http.post(VIDEOS, content=content)
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_json"
    assert len(answer.json()["detail"]) < 200


def test_a_model_without_videos_names_one_with(http: httpx2.Client) -> None:
    answer = http.post(VIDEOS, json={"prompt": "x", "model": "vilau-tiny"})
    refused(answer, 404, "model", "cannot make a video here; use vila-u-7b-256")


def test_another_job_is_no_video(http: httpx2.Client) -> None:
    (data,) = http.post(GENERATIONS, json=APPLE).json()["data"]
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = http.request(method, f"{VIDEOS}/{data['job_id']}{path}")
        refused(answer, 404, None, "makes no video")


# ---------------------------------------------------------------- jobs of every kind

PICTURE = {"kind": "inline", "data": base64.b64encode(WHITE).decode(), "media_type": "image/png"}
DRAW = {"model": "hart-tiny", "prompt": "a red apple", "width": 64, "height": 64, "seed": 3}
SHOW: dict[str, Any] = {"role": "user", "parts": [{"kind": "image", "image": PICTURE}]}
ANSWER = {"model": "vilau-tiny", "turns": [SHOW]}
FILM = {"model": "vila-u-7b-256", "prompt": "a kite", "seed": 3}


def put(http: httpx2.Client, kind: str, request: dict[str, Any]) -> httpx2.Response:
    return http.put(f"/v1/jobs/any-{uuid4().hex}", json={"kind": kind, "request": request})


@pytest.mark.parametrize(
    ("kind", "request_", "media_type"),
    [
        ("generate-image", DRAW, "image/png"),
        ("vary-image", DRAW | {"image": PICTURE, "keep": 1}, "image/png"),
        ("generate-video", FILM, "video/mp4"),
        ("answer", ANSWER, "application/json"),
    ],
)
def test_a_job_of_every_kind_is_taken_and_its_result_fetched(
    http: httpx2.Client, kind: str, request_: dict[str, Any], media_type: str
) -> None:
    state = put(http, kind, request_)
    assert state.status_code == 202, state.text
    job = state.json()
    assert (job["service"], job["kind"]) == ("autoregressive", kind)
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        seen = list(events_of(answer))
    assert seen[-1][1]["state"]["status"] == "succeeded"
    assert ("text" in {name for name, _ in seen}) == (kind == "answer")
    result = http.get(f"/v1/jobs/{job['id']}/result")
    assert result.headers["content-type"] == media_type
    if kind == "answer":
        assert result.json()["text"] == "A picture of 64 by 64, mostly red."


def inline(data: bytes) -> dict[str, str]:
    return PICTURE | {"data": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("kind", "request_", "status", "field"),
    [
        ("paint", DRAW, 422, None),
        ("reconstruct", {"model": "dcae-tiny", "image": PICTURE}, 422, None),
        ("vary-image", DRAW, 422, "request.image"),
        ("vary-image", DRAW | {"image": inline(b"x"), "keep": 1}, 422, "request.image"),
        ("generate-video", FILM | {"frames_per_s": 0}, 422, "request.frames_per_s"),
        ("generate-video", FILM | {"model": "hart-tiny"}, 404, "model"),
        ("answer", {"model": "vilau-tiny", "turns": []}, 422, "request.turns"),
        ("answer", ANSWER | {"model": "hart-tiny"}, 404, "model"),
        ("answer", ANSWER | {"turns": [SHOW | {"parts": SHOW["parts"] * 17}]}, 422, "request"),
        (
            "answer",
            ANSWER | {"turns": [SHOW | {"parts": [{"kind": "image", "image": inline(b"x")}]}]},
            422,
            "request.turns.0.parts.0.image",
        ),
        ("vary-image", DRAW | {"model": "sana-tiny", "image": PICTURE, "keep": 1}, 404, "model"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_job_is_refused_by_field(
    http: httpx2.Client, kind: str, request_: dict[str, Any], status: int, field: str | None
) -> None:
    refused(put(http, kind, request_), status, field)


def test_a_large_picture_in_a_job_becomes_a_blob(http: httpx2.Client) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (672, 672, 3), np.uint8)
    large = inline(encode_picture(noise))
    assert len(large["data"]) > JOB_MESSAGE_BYTES
    answer = put(http, "vary-image", DRAW | {"image": large, "keep": 0})
    assert answer.status_code == 202, answer.text
