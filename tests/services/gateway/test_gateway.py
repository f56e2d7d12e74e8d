"""The image routes over real HTTP: what OpenAI's clients may expect, and what gesso adds."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from gesso_core.pipelines.pictures import decode_picture, encode_picture

pytestmark = pytest.mark.broker

GENERATIONS = "/v1/images/generations"
APPLE = {"model": "sana-tiny", "prompt": "a red apple", "seed": 7}


def pixels_of(data: dict[str, Any]) -> Any:
    return decode_picture(base64.b64decode(data["b64_json"]))


def events_of(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in httpx2.EventSource(answer):
        yield event.event, json.loads(event.data)


def problem_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The problem of a refusal, after checking that both shapes say the same."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["error"]["message"] == body["detail"]
    assert body["error"]["code"] == body["code"]
    assert "Traceback" not in answer.text
    return body


def test_a_prompt_becomes_a_picture_with_its_seed_and_what_made_it(http: httpx2.Client) -> None:
    answer = http.post(GENERATIONS, json=APPLE)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert pixels_of(body["data"][0]).shape == (64, 64, 3)
    assert body["data"][0]["seed"] == 7
    assert body["size"] == "64x64"
    assert body["metadata"]["sampler"] == "flow-dpm-solver"
    assert body["metadata"]["in_domain"] is True
    assert abs(body["created"] - time.time()) < 60


def test_several_pictures_have_consecutive_seeds(http: httpx2.Client) -> None:
    body = http.post(GENERATIONS, json=APPLE | {"n": 3}).json()
    assert [one["seed"] for one in body["data"]] == [7, 8, 9]
    assert [int(pixels_of(one)[0, 0, 2]) for one in body["data"]] == [7, 8, 9]
    assert len({one["job_id"] for one in body["data"]}) == 3


def test_the_model_and_the_seed_may_be_left_out(http: httpx2.Client) -> None:
    body = http.post(GENERATIONS, json={"prompt": "a red apple"}).json()
    assert body["metadata"]["model"] == "sana-tiny"
    assert 0 <= body["data"][0]["seed"] < 2**32


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_url_leads_to_the_picture_in_the_format_asked_for(
    http: httpx2.Client, output_format: str
) -> None:
    wish = APPLE | {"response_format": "url", "output_format": output_format}
    (data,) = http.post(GENERATIONS, json=wish).json()["data"]
    assert "b64_json" not in data
    picture = http.get(data["url"])
    assert picture.headers["content-type"] == f"image/{output_format}"
    assert decode_picture(picture.content).shape == (64, 64, 3)


def test_a_stream_tells_progress_previews_and_the_picture(http: httpx2.Client) -> None:
    wish = APPLE | {"stream": True, "partial_images": 3, "steps": 8}
    with http.stream("POST", GENERATIONS, json=wish) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = list(events_of(answer))
    names = [name for name, _ in seen]
    steps = [data["step"] for name, data in seen if name == "image_generation.progress"]
    assert names[-1] == "image_generation.completed"
    assert 1 <= names.count("image_generation.partial_image") <= 3
    assert steps == sorted(steps)
    assert steps[-1] == 8
    assert all(name == data["type"] for name, data in seen)
    assert pixels_of(seen[-1][1]).shape == (64, 64, 3)
    assert seen[-1][1]["metadata"]["steps"] == 8
    preview = next(data for name, data in seen if name == "image_generation.partial_image")
    assert pixels_of(preview).shape == (64, 64, 3)


def test_a_stream_of_two_pictures_completes_both(http: httpx2.Client) -> None:
    with http.stream("POST", GENERATIONS, json=APPLE | {"stream": True, "n": 2}) as answer:
        done = {data["index"]: data for name, data in events_of(answer) if "completed" in name}
    assert {index: data["seed"] for index, data in done.items()} == {0: 7, 1: 8}


def test_a_silent_stream_shows_that_it_lives(http: httpx2.Client) -> None:
    wish = APPLE | {"stream": True, "prompt": "slowly, a snail", "steps": 2}
    with http.stream("POST", GENERATIONS, json=wish) as answer:
        text = "".join(answer.iter_text())
    assert ": ping" in text
    assert "event: image_generation.completed" in text


def test_a_failed_job_answers_with_its_own_problem(http: httpx2.Client) -> None:
    body = problem_of(http.post(GENERATIONS, json=APPLE | {"prompt": "too large"}), 507)
    assert body["code"] == "out_of_memory"
    assert "smaller" in body["detail"]


def test_a_failed_job_ends_a_stream_with_an_error_event(http: httpx2.Client) -> None:
    wish = APPLE | {"prompt": "too large", "stream": True}
    with http.stream("POST", GENERATIONS, json=wish) as answer:
        *_, (name, data) = events_of(answer)
    assert name == "error"
    assert data["error"]["code"] == "out_of_memory"


def test_out_of_domain_prompts_come_back_with_suggestions(http: httpx2.Client) -> None:
    body = http.post(GENERATIONS, json=APPLE | {"prompt": "an unheard of thing"}).json()
    assert body["metadata"]["in_domain"] is False
    assert "a red apple" in body["metadata"]["suggestions"]


def leave_while_waiting(http: httpx2.Client, wish: dict[str, Any]) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        http.post(GENERATIONS, json=wish, timeout=0.6)


def leave_a_stream(http: httpx2.Client, wish: dict[str, Any]) -> None:
    with http.stream("POST", GENERATIONS, json=wish | {"stream": True}) as answer:
        assert next(events_of(answer))


@pytest.mark.parametrize("leave", [leave_while_waiting, leave_a_stream])
def test_a_client_that_leaves_withdraws_its_job(
    http: httpx2.Client, leave: Callable[[httpx2.Client, dict[str, Any]], None]
) -> None:
    def jobs() -> dict[str, str]:
        page = http.get("/v1/jobs", params={"limit": 200}).json()
        return {job["id"]: job["status"] for job in page["data"]}

    before = jobs()
    leave(http, {"prompt": "slowly, a tortoise", "steps": 100, "seed": 1})
    (mine,) = jobs().keys() - before.keys()
    with http.stream("GET", f"/v1/jobs/{mine}/events") as answer:
        *_, (_, last) = events_of(answer)
    assert last["state"]["status"] == "cancelled"


def test_the_same_idempotency_key_gives_the_same_picture_from_one_job(http: httpx2.Client) -> None:
    wish = {"prompt": "a red apple"}
    headers = {"Idempotency-Key": "order 66"}
    first = http.post(GENERATIONS, json=wish, headers=headers).json()
    second = http.post(GENERATIONS, json=wish, headers=headers).json()
    assert first["data"] == second["data"]
    other = http.post(GENERATIONS, json={"prompt": "a green apple"}, headers=headers)
    assert problem_of(other, 409)["code"] == "conflict"


def test_jobs_with_an_idempotency_key_outlive_their_connection(http: httpx2.Client) -> None:
    wish = {"prompt": "slowly, a snail", "steps": 6}
    headers = {"Idempotency-Key": "patience"}
    with pytest.raises(httpx2.ReadTimeout):
        http.post(GENERATIONS, json=wish, headers=headers, timeout=0.4)
    again = http.post(GENERATIONS, json=wish, headers=headers)
    assert again.status_code == 200, again.text


def test_a_deadline_ends_the_wait_and_withdraws_the_job(start_gateway: Any) -> None:
    gateway = start_gateway(deadline_s=0.4)
    with httpx2.Client(base_url=gateway.url) as http:
        answer = http.post(GENERATIONS, json={"prompt": "slowly, a snail", "steps": 100})
    assert problem_of(answer, 504)["code"] == "deadline_exceeded"


def test_many_requests_at_once_each_get_their_own_picture(http: httpx2.Client) -> None:
    seeds: dict[int, int] = {}

    def one(seed: int) -> None:
        (data,) = http.post(GENERATIONS, json=APPLE | {"seed": seed}).json()["data"]
        seeds[seed] = int(pixels_of(data)[0, 0, 2])

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seeds == {seed: seed for seed in range(24)}


def test_reconstruction_tells_what_was_lost(http: httpx2.Client) -> None:
    picture = encode_picture(np.full((32, 48, 3), 128, np.uint8))
    answer = http.post("/v1/images/reconstructions", files={"image": ("a.png", picture)})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["size"] == "48x32"
    assert body["psnr_db"] == 100.0
    assert pixels_of(body).shape == (32, 48, 3)
