"""``/v1/chat/completions`` with OpenAI's own client: answers, streams, and what is refused."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from gesso_core.pipelines.pictures import encode_picture
from gesso_core.pipelines.videos import encode_video
from gesso_services.gateway.uploads import INLINE_BYTES_PER_JOB

pytestmark = pytest.mark.broker

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def url_of(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def plain(colour: tuple[int, int, int], width: int = 48, height: int = 32) -> str:
    return url_of(encode_picture(np.full((height, width, 3), colour, np.uint8)))


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


RED, BLUE = plain((250, 0, 0)), plain((0, 0, 250))
SEEN = "A picture of 48 by 32, mostly red."


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="vilau-tiny", messages=messages, **options)


def test_a_question_about_a_picture_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client, user(text("what is this?"), image(RED)))
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", SEEN)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.object, answer.model) == ("chat.completion", "vilau-tiny")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert answer.usage.total_tokens == 11


def test_a_stream_brings_the_same_words_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(ask(client, user(text("slowly, what?"), image(RED)), stream=True))
    first, *middle, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in middle]
    assert len(pieces) > 3
    assert "".join(pieces) == SEEN
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = ask(client, user(image(RED)), **options)
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_stream_on_the_wire_is_data_lines_and_ends_with_done(http: httpx2.Client) -> None:
    body = {"messages": user(image(RED)), "stream": True}
    answer = http.post(CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block and block[0] != ":"]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    first = json.loads(blocks[0].removeprefix("data: "))
    assert first["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert "usage" not in first


def test_a_cut_answer_says_that_it_was_cut(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = ask(client, user(image(RED)), **{name: 3}).choices
        assert (choice.message.content, choice.finish_reason) == ("A picture of", "length")


def test_words_alone_are_a_conversation_too(client: openai.OpenAI) -> None:
    answer = ask(client, [{"role": "developer", "content": "be brief"}, *HELLO], seed=5)
    assert answer.choices[0].message.content == "I see nothing; the seed is 5."


def test_an_answer_can_be_given_back_as_a_turn(client: openai.OpenAI) -> None:
    messages: list[Any] = user(image(RED))
    messages.append(ask(client, messages).choices[0].message)
    messages += user(text("and this?"), image(BLUE))
    said = ask(client, messages).choices[0].message.content
    assert said == f"{SEEN} A picture of 48 by 32, mostly blue."


def test_a_video_can_be_shown(client: openai.OpenAI) -> None:
    frames = np.stack([np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)])
    for video_format, media_type in (("mp4", "video/mp4"), ("gif", "image/gif")):
        url = url_of(encode_video(frames, video_format), media_type)
        answer = ask(client, user({"type": "video_url", "video_url": {"url": url}}))
        assert answer.choices[0].message.content == "A video of 6 frames."


def test_pictures_too_large_for_a_message_come_through(client: openai.OpenAI) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (480, 480, 3), np.uint8)
    large = url_of(encode_picture(noise))
    assert len(large) > INLINE_BYTES_PER_JOB
    said = ask(client, user(image(large), image(RED), image(large))).choices[0].message.content
    assert said.count("480 by 480") == 2
    assert SEEN in said


def test_all_neutral_options_of_other_clients_are_taken(client: openai.OpenAI) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False}
    options = {"temperature": 0.5, "top_p": 0.9, "stop": "\n", "user": "someone"}
    response_format: Any = {"type": "text"}
    assert ask(client, HELLO, **neutral, **options, response_format=response_format)
    assert ask(client, HELLO, stop=["\n", "."])


def test_a_failed_job_is_an_error_of_its_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="fewer pictures") as failed:
        ask(client, user(text("too large"), image(RED)))
    assert failed.value.status_code == 507
    with pytest.raises(openai.APIError, match="fewer pictures"):
        list(ask(client, user(text("too large"), image(RED)), stream=True))


def test_an_answer_that_begins_anew_is_whole_or_an_error(client: openai.OpenAI) -> None:
    stumbling = user(text("stumbles"), image(RED))
    assert ask(client, stumbling).choices[0].message.content == SEEN
    with pytest.raises(openai.APIError, match="ask again"):
        list(ask(client, stumbling, stream=True))


def newest_job(http: httpx2.Client) -> dict[str, Any]:
    (job,) = http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    return dict(job)


def wait_for(http: httpx2.Client, job_id: str) -> str:
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        *_, last = httpx2.EventSource(answer)
    return str(json.loads(last.data)["state"]["status"])


SLOW = user(text("slowly, describe"), *[image(RED)] * 16)


def test_a_client_that_leaves_a_stream_withdraws_its_job(
    client: openai.OpenAI, http: httpx2.Client
) -> None:
    with ask(client, SLOW, stream=True, max_tokens=200) as stream:
        job_id = next(iter(stream)).id
        assert next(iter(stream)).choices[0].delta.content
    assert wait_for(http, job_id) == "cancelled"


def test_a_client_that_does_not_wait_withdraws_its_job(http: httpx2.Client) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        http.post(CHAT, json={"messages": SLOW, "max_tokens": 200}, timeout=0.5)
    job = newest_job(http)
    assert job["kind"] == "answer"
    assert wait_for(http, job["id"]) == "cancelled"


def test_the_same_idempotency_key_gives_the_same_answer_from_one_job(http: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "chat once"}
    body = {"messages": HELLO, "temperature": 1.0}
    first, second = (http.post(CHAT, json=body, headers=headers).json() for _ in range(2))
    assert (first["id"], first["choices"]) == (second["id"], second["choices"])
    other = http.post(CHAT, json={"messages": user(text("bye"))}, headers=headers)
    assert other.status_code == 409


@pytest.mark.anyio
async def test_many_conversations_at_once_each_get_their_own_answer(server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def one(seed: int) -> str:
            wish: Any = {"model": "vilau-tiny", "messages": HELLO, "seed": seed, "stream": True}
            chunks = [chunk async for chunk in await client.chat.completions.create(**wish)]
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        said = await asyncio.gather(*(one(seed) for seed in range(12)))
    assert said == [f"I see nothing; the seed is {seed}." for seed in range(12)]


CUT = RED[: len("data:image/png;base64,") + 80]
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "system", "content": "be brief"}]}, "messages.0.role", "user's"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages.1.role", "user's"),
    ({"messages": user(text("  "))}, "messages.0.content", "says and shows nothing"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content", "nothing"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid string"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": user(text("x" * 4001))}, "messages.0.content.0.text", "at most 4000"),
    ({"messages": HELLO * 65}, "messages", "at most 64"),
    ({"messages": user(*[image(RED)] * 17)}, "messages", "at most 16"),
    ({"messages": user({"type": "input_audio"})}, "messages.0.content.0", "'image_url'"),
    ({"messages": user({"text": "x"})}, "messages.0.content.0", "'image_url'"),
    (
        {"messages": user({"type": "image_url", "image_url": RED})},
        "messages.0.content.0.image_url",
        "",
    ),
    (
        {"messages": [{"role": "system", "content": [image(RED)]}, *HELLO]},
        "messages.0.content",
        "only a user's",
    ),
    ({"n": 2}, "n", "less than or equal to 1"),
    ({"tools": []}, "tools", "not permitted"),
    ({"logit_bias": {}}, "logit_bias", "not permitted"),
    ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
    ({"logprobs": True}, "logprobs", "False"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, "max_tokens", "less than or equal to 4096"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "contradict"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": "yes"}, "stream", "boolean"),
]


@pytest.mark.parametrize(
    ("change", "field", "word"), REFUSALS, ids=lambda value: str(value).replace("'", "")[:40]
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    http: httpx2.Client, change: dict[str, Any], field: str, word: str
) -> None:
    answer = http.post(CHAT, json={"messages": HELLO} | change)
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body["error"]["param"] == field, body
    assert word in body["detail"]
    assert len(body["detail"]) < 400


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://example.com/cat.png", "opens no other"),
        ("https://169.254.169.254/latest", "opens no other"),
        ("file:///etc/passwd", "opens no other"),
        ("/etc/passwd", "opens no other"),
        ("", "opens no other"),
        ("data:image/png,notbase64", "opens no other"),
        ("data:image/png;base64,????", "not base64"),
        ("data:image/png;base64,", "do not begin like a picture"),
        (url_of(b"hello, world"), "do not begin like a picture"),
        (
            url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
            "PNG, JPEG or WebP",
        ),
        (CUT, "not a whole picture"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_a_picture_in_the_request_is_refused_and_nothing_is_fetched(
    http: httpx2.Client, url: str, word: str
) -> None:
    for kind, sentence in (("image_url", word), ("video_url", "")):
        part = {"type": kind, kind: {"url": url}}
        answer = http.post(CHAT, json={"messages": user(text("what?"), part)})
        assert answer.status_code == 422, answer.text
        assert answer.json()["field"] == f"messages.0.content.1.{kind}.url"
        assert sentence in answer.json()["detail"]
        assert len(answer.json()["detail"]) < 400


def test_a_huge_body_is_413_and_says_the_limit(http: httpx2.Client) -> None:
    body = {"messages": user(image("data:image/png;base64," + "A" * (33 * 2**20)))}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 413
    assert "33,554,432" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("vilau-tinny", "available: vila-u-7b-256, vilau-tiny"),
        ("hart-tiny", "cannot answer in a chat here; use vilau-tiny or vila-u-7b-256"),
        ("sana-tiny", "use vilau-tiny"),
        ("dcae-tiny", "use vilau-tiny"),
    ],
)
def test_a_model_that_cannot_answer_names_those_that_can(
    http: httpx2.Client, model: str, word: str
) -> None:
    answer = http.post(CHAT, json={"model": model, "messages": HELLO})
    assert (answer.status_code, answer.json()["field"]) == (404, "model")
    assert word in answer.json()["detail"]
