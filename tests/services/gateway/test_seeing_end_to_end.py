"""The real services behind the real edge: small models of random weights, OpenAI's own client."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_core.pipelines.videos import decode_video
from gesso_services import autoencoder, autoregressive
from gesso_services.runtime.service import ServiceSpec

pytestmark = [pytest.mark.broker, pytest.mark.slow]

GENERATIONS = "/v1/images/generations"
SETTINGS = {
    "default_model": "scales",
    "default_seeing_model": "seer",
    "default_autoencoder": "scales",
    "required_services": ("autoencoder", "autoregressive"),
}


@pytest.fixture(scope="module")
def url(
    start_services: Any, tiny_hart: Path, tiny_vila_u: Path, tmp_path_factory: Any
) -> Iterator[str]:
    """A gateway before an autoencoder service and an autoregressive one."""
    folders = {"scales": tiny_hart, "seer": tiny_vila_u}

    def specs() -> list[ServiceSpec]:
        decodes = autoencoder.AutoencoderSettings(models=(), folders=folders)
        draws = autoregressive.AutoregressiveSettings(models=(), folders=folders)
        return [autoencoder.build_service(decodes), autoregressive.build_service(draws)]

    with start_services(tmp_path_factory.mktemp("nats"), specs, **SETTINGS) as gateway:
        yield gateway.url


@pytest.fixture(scope="module")
def web(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels_of(data: dict[str, Any]) -> Pixels:
    return decode_picture(base64.b64decode(data["b64_json"]))


def events_of(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in httpx2.EventSource(answer):
        yield event.event, json.loads(event.data)


@pytest.mark.parametrize("model", ["scales", "seer"])
def test_a_picture_comes_with_previews_and_is_the_same_alone_and_in_a_crowd(
    web: httpx2.Client, model: str
) -> None:
    wish = {"model": model, "prompt": "a red apple", "seed": 7, "stream": True}
    with web.stream("POST", GENERATIONS, json=wish | {"partial_images": 3}) as answer:
        seen = list(events_of(answer))
    names = [name.rpartition(".")[2] for name, _ in seen]
    assert "partial_image" in names
    assert names[-1] == "completed"
    assert seen[-1][1]["total_steps"] == 4
    crowd = web.post(GENERATIONS, json=wish | {"stream": False, "n": 4}).json()["data"]
    assert np.array_equal(pixels_of(crowd[0]), pixels_of(seen[-1][1]))


def test_words_are_streamed_and_add_up_to_the_answer(client: openai.OpenAI) -> None:
    picture = base64.b64encode(encode_picture(np.full((64, 64, 3), 90, np.uint8))).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "what is it?"},
    ]
    wish: Any = {"model": "seer", "messages": [{"role": "user", "content": parts}]}
    whole = client.chat.completions.create(**wish, max_tokens=24)
    chunks = list(client.chat.completions.create(**wish, max_tokens=24, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens > 4


def test_the_best_of_many_has_the_score_that_the_judge_gives(web: httpx2.Client) -> None:
    wish = {"model": "scales", "prompt": "a red apple", "seed": 1, "best_of": 4, "n": 2}
    data = web.post(GENERATIONS, json=wish).json()["data"]
    scores = [one["metadata"]["score"] for one in data]
    assert scores == sorted(scores, reverse=True)
    question = {"prompt": wish["prompt"], "images": [one["b64_json"] for one in data]}
    assert web.post("/v1/judgements", json=question).json()["scores"] == pytest.approx(scores)


def test_a_variation_and_a_video_are_made(web: httpx2.Client) -> None:
    picture = encode_picture(np.full((64, 64, 3), 90, np.uint8))
    for model in ("scales", "seer"):
        form = {"model": model, "prompt": "a pear", "keep": "2", "seed": "3"}
        answer = web.post("/v1/images/variations", files={"image": picture}, data=form)
        assert pixels_of(answer.json()["data"][0]).shape == (64, 64, 3)
    video = web.post("/v1/videos", json={"prompt": "a kite", "seed": 3}).json()
    with web.stream("GET", f"/v1/jobs/{video['id']}/events") as answer:
        *_, (_, last) = events_of(answer)
    assert last["state"]["status"] == "succeeded", last
    frames = decode_video(web.get(f"/v1/videos/{video['id']}/content").content, 100)
    assert len(frames) == 2


def test_what_the_model_refuses_is_told_with_its_field(web: httpx2.Client) -> None:
    wish = {"model": "scales", "prompt": "an apple", "negative_prompt": "worms"}
    answer = web.post(GENERATIONS, json=wish)
    assert (answer.status_code, answer.json()["field"]) == (422, "negative_prompt")
    for change, words in (
        ({"prompt": "long " * 700, "best_of": 2}, "the model that judges takes 256"),
        ({"prompt": "<image> in red", "model": "seer"}, "leave <image> out"),
    ):
        answer = web.post(GENERATIONS, json={"model": "scales"} | change)
        assert (answer.status_code, answer.json()["field"]) == (422, "prompt")
        assert words in answer.json()["detail"]
    asked = {"messages": [{"role": "user", "content": "long " * 700}], "model": "seer"}
    answer = web.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 422
    assert "shorten it" in answer.json()["detail"]
