"""Answers, judgements and videos of a model that sees, by the real services over a real broker."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from gesso_contracts import conversations as c
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_contracts.jobs import JobProgress, JobState, JobText
from gesso_core.errors import InvalidRequest, UnreadableImage
from gesso_core.pipelines.pictures import Pixels, encode_picture
from gesso_core.pipelines.videos import decode_video, encode_video
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost

pytestmark = [pytest.mark.anyio, pytest.mark.broker]


@pytest.fixture
def store(token_store: JobStore) -> JobStore:
    return token_store


@pytest.fixture
def gateway(token_bus: Bus) -> Bus:
    return token_bus


def plain(red: int, green: int, blue: int, side: int = 48) -> Pixels:
    return np.full((side, side, 3), (red, green, blue), dtype=np.uint8)


def picture(pixels: Pixels) -> c.ImagePart:
    return c.ImagePart(image=Inline(data=encode_picture(pixels), media_type="image/png"))


def question(*parts: c.Part | str, **options: object) -> c.AnswerTurn:
    said = [c.TextPart(text=part) if isinstance(part, str) else part for part in parts]
    turns = [c.Turn(role="user", parts=said)] if said else []
    return c.AnswerTurn(**({"model": "seer", "turns": turns, "max_tokens": 24} | options))


async def answered(store: JobStore, request: c.AnswerTurn) -> c.TurnAnswered:
    state = await ended(store, request)
    assert state.status == "succeeded", state.problem
    return c.TurnAnswered.model_validate(state.result)


async def ended(store: JobStore, request: c.AnswerTurn | m.GenerateVideo) -> JobState:
    kind = "answer" if isinstance(request, c.AnswerTurn) else "generate-video"
    state, _ = await store.submit("autoregressive", kind, request)
    return await wait_for(store, state.id, 30)


async def test_words_are_told_as_they_come_and_each_event_has_all_of_them(
    token_services: ServiceHost, store: JobStore
) -> None:
    async with follow(store, "said", new=True) as events:
        request = question(picture(plain(200, 20, 20)), "what is this?", temperature=1.0)
        await store.submit("autoregressive", "answer", request, job_id="said")
        seen = [event async for event in events]
    texts = [event.text for event in seen if isinstance(event, JobText)]
    assert len(texts) >= 2
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(set(texts)) == len(texts)
    state = await wait_for(store, "said", 5)
    answer = c.TurnAnswered.model_validate(state.result)
    assert answer.text == texts[-1]
    assert answer.answer_tokens == [e.step for e in seen if isinstance(e, JobProgress)][-1]


async def test_an_answer_ends_at_its_length_or_where_it_is_told_to(
    token_services: ServiceHost, store: JobStore
) -> None:
    whole = await answered(store, question("what is this?"))
    short = await answered(store, question("what is this?", max_tokens=3))
    assert (short.finish_reason, short.answer_tokens) == ("length", 3)
    assert whole.text.startswith(short.text)
    middle = whole.text[len(whole.text) // 2]
    stopped = await answered(store, question("what is this?", stop=[middle]))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(middle)]


async def test_answers_among_drawings_are_those_that_come_alone(
    token_services: ServiceHost, store: JobStore
) -> None:
    asked = [
        question(picture(plain(40 * i, 90, 10)), "what is this? " * (i + 1), seed=i, temperature=t)
        for i, t in enumerate((0.0, 0.8, 1.2, 0.0))
    ]
    alone = [(await answered(store, one)).text for one in asked]
    assert len(set(alone)) > 1
    drawings = [
        store.submit(
            "autoregressive",
            "generate-image",
            m.GenerateImage(
                model=("seer", "scales")[i % 2], prompt="pears", width=64, height=64, seed=i
            ),
        )
        for i in range(6)
    ]
    together = await asyncio.gather(*drawings, *(answered(store, one) for one in asked))
    states = [await wait_for(store, submitted[0].id, 30) for submitted in together[:6]]
    assert {state.status for state in states} == {"succeeded"}
    assert [answer.text for answer in together[6:]] == alone


async def test_a_conversation_goes_on_and_shows_pictures_and_videos(
    token_services: ServiceHost, store: JobStore
) -> None:
    frames = np.stack([plain(250, 10, 10), plain(10, 250, 10), plain(10, 10, 250)])
    video = c.VideoPart(video=Inline(data=encode_video(frames, "gif"), media_type="image/gif"))
    turns = [
        c.Turn(role="user", parts=[picture(plain(9, 9, 200)), c.TextPart(text="what is this?")]),
        c.Turn(role="assistant", parts=[c.TextPart(text="a blue table")]),
        c.Turn(role="user", parts=[video, c.TextPart(text="and this?")]),
    ]
    answer = await answered(store, question(turns=turns))
    other = [*turns[:2], c.Turn(role="user", parts=[c.TextPart(text="and this?")])]
    without = await answered(store, question(turns=other))
    more = answer.prompt_tokens - without.prompt_tokens
    assert 2 * 16 < more <= 2 * 16 + 4  # two frames and their line ends
    assert answer.text != without.text


async def test_what_cannot_be_answered_fails_with_the_field(
    token_services: ServiceHost, store: JobStore
) -> None:
    junk = c.ImagePart(image=Inline(data=b"junk", media_type="image/png"))
    no_video = c.VideoPart(video=Inline(data=b"junk" * 9, media_type="video/mp4"))
    for request, code, field in (
        (question("hello", model="scales"), "invalid_request", "model"),
        (question("hello", model="nobody"), "unknown_model", "model"),
        (question("pear " * 300), "invalid_request", "messages"),
        (question("hello", max_tokens=4000), "invalid_request", "messages"),
        (question("see <image>"), "invalid_request", "messages"),
        (question(junk, "what?"), "unreadable_image", "messages"),
        (question(no_video, "what?"), "invalid_request", "video"),
    ):
        state = await ended(store, request)
        assert state.problem is not None, request
        assert (state.problem.code, state.problem.field) == (code, field)


async def test_pictures_are_judged_one_by_one_however_many_come_together(
    token_services: ServiceHost, gateway: Bus
) -> None:
    shown = [picture(plain(60 * i, 200 - 50 * i, 30)).image for i in range(4)]

    async def scores(images: list[Inline], prompt: str = "a red apple") -> list[float]:
        request = c.JudgeImages(model="seer", prompt=prompt, images=images)
        judged = await call(gateway, "autoregressive", "judge", request, c.ImagesJudged)
        return judged.scores

    together = await scores(shown)
    alone = [(await scores([image]))[0] for image in shown]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len(set(together)) == 4
    assert await scores(shown, "a green pear") != together


async def test_what_cannot_be_judged_is_refused_with_the_field(
    token_services: ServiceHost, gateway: Bus
) -> None:
    image = picture(plain(1, 2, 3)).image
    junk = Inline(data=b"junk", media_type="image/png")
    request = c.JudgeImages(model="seer", prompt="x", images=[image, junk])
    with pytest.raises(UnreadableImage) as refused:
        await call(gateway, "autoregressive", "judge", request, c.ImagesJudged)
    assert refused.value.field == "images.1"
    blind = c.JudgeImages(model="scales", prompt="x", images=[image])
    with pytest.raises(InvalidRequest, match="ask a model that sees"):
        await call(gateway, "autoregressive", "judge", blind, c.ImagesJudged)


async def test_a_prompt_is_checked_before_there_are_pictures_to_judge(
    token_services: ServiceHost, gateway: Bus
) -> None:
    async def check(prompt: str, model: str = "seer") -> int:
        request = c.CheckJudgement(model=model, prompt=prompt)
        checked = await call(
            gateway, "autoregressive", "check-judgement", request, c.JudgementChecked
        )
        return checked.tokens

    assert 16 < await check("a red apple") < await check("a red apple on a table") < 256
    for prompt, model, field, words in (
        ("pear " * 300, "seer", "prompt", "takes 256: shorten the prompt"),
        ("a <image>", "seer", "prompt", "mark of the model"),
        ("...", "seer", "prompt", "empty"),
        ("a pear", "scales", "model", "ask a model that sees"),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            await check(prompt, model)
        assert refused.value.field == field


@pytest.mark.parametrize("video_format", ["mp4", "webp", "gif"])
async def test_words_become_a_video(
    token_services: ServiceHost, store: JobStore, gateway: Bus, video_format: m.VideoFormat
) -> None:
    request = m.GenerateVideo(
        model="seer",
        prompt="an apple rolls",
        seed=3,
        frames_per_s=4,
        output_format=video_format,
        preview_every=1,
    )
    state = await ended(store, request)
    assert state.status == "succeeded", state.problem
    ready = m.VideoReady.model_validate(state.result)
    assert (ready.frames, ready.frames_per_s, ready.width, ready.height) == (2, 4, 64, 64)
    assert (state.step, state.total_steps) == (8, 8)
    frames = decode_video(await BlobStore(gateway).get(ready.video), 10)
    assert frames.shape == (2, 64, 64, 3)
    assert not np.array_equal(frames[0], frames[1])


async def test_a_model_without_video_says_so(token_services: ServiceHost, store: JobStore) -> None:
    state = await ended(store, m.GenerateVideo(model="scales", prompt="an apple", seed=1))
    assert state.problem is not None
    assert (state.problem.code, state.problem.field) == ("invalid_request", "model")
