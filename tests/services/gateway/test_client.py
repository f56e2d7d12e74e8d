"""The Python client against a real gateway: pictures, progress, jobs, and errors as sentences."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from gesso_contracts import JobProgress, JobStateChanged
from gesso_core.pipelines.pictures import decode_picture, encode_picture
from gesso_core.pipelines.videos import decode_video, encode_video
from gesso_services.client import ApiError, AsyncGesso, Gesso, NotReachable, Progress

pytestmark = pytest.mark.broker

REQUEST = {"model": "sana-tiny", "prompt": "a red apple", "width": 64, "height": 64, "seed": 3}


class Enough(Exception):
    pass


def test_generate_returns_pictures_and_tells_progress(gesso: Gesso, tmp_path: Path) -> None:
    told: list[Progress] = []
    pictures = gesso.generate(
        "a red apple", n=2, seed=5, steps=6, partial_images=2, on_progress=told.append
    )
    assert [picture.seed for picture in pictures] == [5, 6]
    assert {at.index for at in told} == {0, 1}
    assert any(at.preview for at in told)
    assert pictures[0].metadata["steps"] == 6
    saved = pictures[0].save(tmp_path / "apple.png")
    assert decode_picture(saved.read_bytes()).shape == (64, 64, 3)


def test_an_exception_in_the_callback_withdraws_the_job(gesso: Gesso) -> None:
    def stop(at: Progress) -> None:
        if at.step >= 2:
            raise Enough

    with pytest.raises(Enough):
        gesso.generate("slowly, a snail", steps=100, seed=77, on_progress=stop)
    newest = gesso.jobs(limit=1)[0]
    *_, last = gesso.watch(newest.id)
    assert isinstance(last, JobStateChanged)
    assert last.state.status == "cancelled"


def test_a_job_can_be_submitted_watched_and_fetched(gesso: Gesso) -> None:
    job_id = f"client-{uuid4().hex}"
    assert gesso.submit(job_id, REQUEST).id == job_id
    events = list(gesso.watch(job_id))
    assert any(isinstance(event, JobProgress) for event in events)
    assert gesso.job(job_id).status == "succeeded"
    assert decode_picture(gesso.result(job_id)).shape == (64, 64, 3)
    assert job_id in {state.id for state in gesso.jobs(status="succeeded")}


def test_cancel_withdraws_a_job(gesso: Gesso) -> None:
    job_id = f"client-{uuid4().hex}"
    gesso.submit(job_id, REQUEST | {"prompt": "slowly, a snail", "steps": 60})
    assert gesso.cancel(job_id).cancel_requested
    *_, last = gesso.watch(job_id)
    assert isinstance(last, JobStateChanged)
    assert last.state.status == "cancelled"


def test_reconstruct_says_how_close_it_stayed(gesso: Gesso) -> None:
    made = gesso.reconstruct(encode_picture(np.zeros((32, 32, 3), np.uint8)), output_format="webp")
    assert (made.psnr_db, made.output_format) == (100.0, "webp")


WHITE = encode_picture(np.full((64, 64, 3), 255, np.uint8))
SEEN = "A picture of 64 by 64, mostly red."


def test_ask_shows_pictures_and_tells_the_words_as_they_come(gesso: Gesso) -> None:
    heard: list[str] = []
    answer = gesso.ask("slowly, what is this?", WHITE, on_text=heard.append)
    assert answer.text == "".join(heard) == SEEN
    assert len(heard) > 3
    assert (answer.finish_reason, answer.model) == ("stop", "vilau-tiny")
    assert (answer.prompt_tokens, answer.answer_tokens) == (4, 8)
    assert gesso.ask("and now?", WHITE, max_tokens=2).finish_reason == "length"
    assert gesso.ask("who?", seed=3).text == "I see nothing; the seed is 3."


def test_ask_shows_videos_too(gesso: Gesso) -> None:
    frames = np.stack([np.full((32, 32, 3), 9 * i, np.uint8) for i in range(4)])
    for video_format in ("mp4", "gif"):
        said = gesso.ask("what moves?", encode_video(frames, video_format), WHITE).text
        assert said == f"A video of 4 frames. {SEEN}"


def test_chat_takes_messages_and_gives_pieces(gesso: Gesso) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    pieces = list(gesso.chat(messages, seed=4))
    assert "".join(pieces) == "I see nothing; the seed is 4."


def test_judge_scores_every_picture(gesso: Gesso) -> None:
    black = encode_picture(np.zeros((8, 8, 3), np.uint8))
    assert gesso.judge("something blue", WHITE, black) == [1.0, 0.0]


def test_generate_returns_the_best_of_many_with_their_scores(gesso: Gesso) -> None:
    pictures = gesso.generate("a red apple", seed=5, best_of=4, n=2, model="hart-tiny")
    assert [picture.seed for picture in pictures] == [8, 7]
    assert [picture.score for picture in pictures] == [8 / 255, 7 / 255]


def test_vary_keeps_a_part_of_the_picture(gesso: Gesso) -> None:
    told: list[Progress] = []
    pictures = gesso.vary(WHITE, "a pear", keep=3, n=2, seed=1, on_progress=told.append)
    assert len(gesso.vary(WHITE, "a pear", n=None)) == 1
    assert [picture.seed for picture in pictures] == [1, 2]
    assert (decode_picture(pictures[1].data)[:48] == 255).all()
    assert told[-1].progress == 1.0


def test_video_tells_progress_and_comes_as_a_file(gesso: Gesso, tmp_path: Path) -> None:
    told: list[Progress] = []
    video = gesso.video("slowly, a kite", seed=2, fps=5, on_progress=told.append)
    assert (video.seed, video.size, video.seconds) == (2, "64x32", 1.0)
    assert told[-1].progress == 1.0
    assert any(at.preview for at in told)
    assert [at.progress for at in told] == sorted(at.progress for at in told)
    assert len(decode_video(video.save(tmp_path / "kite.mp4").read_bytes(), 100)) == 5


def test_leaving_a_video_early_withdraws_its_job(gesso: Gesso) -> None:
    def stop(at: Progress) -> None:
        if at.step >= 1:
            raise Enough

    with pytest.raises(Enough):
        gesso.video("slowly, a kite", on_progress=stop)
    *_, last = gesso.watch(gesso.jobs(limit=1)[0].id)
    assert isinstance(last, JobStateChanged)
    assert (last.state.kind, last.state.status) == ("generate-video", "cancelled")


def test_models_and_readiness(gesso: Gesso) -> None:
    assert {"sana-tiny", "hart-tiny", "dcae-tiny"} <= {model["id"] for model in gesso.models()}
    assert gesso.ready()["ready"] is True


@pytest.mark.parametrize(
    ("call", "status", "word"),
    [
        (lambda gesso: gesso.generate(""), 422, "at least 1 character"),
        (lambda gesso: gesso.generate("too large"), 507, "smaller"),
        (lambda gesso: gesso.generate("a", model="sanna"), 404, "sana-tiny"),
        (lambda gesso: gesso.job("nobody"), 404, "no job 'nobody'"),
        (lambda gesso: gesso.result("nobody"), 404, "no job 'nobody'"),
        (lambda gesso: list(gesso.watch("nobody")), 404, "no job 'nobody'"),
        (lambda gesso: gesso.reconstruct(b"not a picture"), 422, "PNG"),
        (lambda gesso: gesso.job("../models"), 404, "nothing at"),
        (lambda gesso: gesso.ask("too large"), 507, "fewer pictures"),
        (lambda gesso: gesso.ask("x", b"not a picture"), 422, "PNG"),
        (lambda gesso: gesso.ask("x", model="sana-tiny"), 404, "use vilau-tiny"),
        (lambda gesso: list(gesso.chat([])), 422, "at least 1 item"),
        (lambda gesso: gesso.judge("x"), 422, "at least 1 item"),
        (lambda gesso: gesso.vary(b"not a picture"), 422, "PNG"),
        (lambda gesso: gesso.video("x", model="hart-tiny"), 404, "vila-u-7b-256"),
    ],
)
def test_a_refusal_is_an_api_error_with_the_servers_sentence(
    gesso: Gesso, call: Any, status: int, word: str
) -> None:
    with pytest.raises(ApiError, match=word) as refused:
        call(gesso)
    assert refused.value.status == status


def test_a_wrong_key_is_an_api_error(start_gateway: Any) -> None:
    gateway = start_gateway(api_keys="right")
    with Gesso(gateway.url, "wrong") as gesso, pytest.raises(ApiError, match="Bearer"):
        gesso.models()
    with Gesso(gateway.url, "right") as gesso:
        assert gesso.models()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[bad"])
def test_nobody_there_is_one_sentence_with_what_to_do(url: str) -> None:
    with pytest.raises(NotReachable, match="gesso up"):
        Gesso(url).models()


@pytest.mark.anyio
async def test_the_async_client_does_the_same(server: Any) -> None:
    told: list[Progress] = []
    async with AsyncGesso(server.url) as gesso:
        (picture,) = await gesso.generate("a red apple", seed=9, on_progress=told.append)
        assert (picture.seed, told[-1].progress) == (9, 1.0)
        job_id = f"client-{uuid4().hex}"
        await gesso.submit(job_id, REQUEST)
        events = [event async for event in gesso.watch(job_id)]
        assert isinstance(events[-1], JobStateChanged)
        assert (await gesso.job(job_id)).status == "succeeded"
        assert await gesso.result(job_id)
        assert await gesso.models()
        made = await gesso.reconstruct(encode_picture(np.zeros((32, 32, 3), np.uint8)))
        assert made.ssim == 1.0
        heard: list[str] = []
        assert (await gesso.ask("what?", WHITE, on_text=heard.append)).text == SEEN
        assert "".join(heard) == SEEN
        hello = [{"role": "user", "content": "hello"}]
        assert [piece async for piece in gesso.chat(hello, max_tokens=1)] == ["I"]
        assert await gesso.judge("something blue", WHITE) == [1.0]
        assert (await gesso.vary(WHITE, "a pear", keep=1, seed=4))[0].seed == 4
        assert (await gesso.video("a kite", fps=5, on_progress=told.append)).seconds == 1.0
        with pytest.raises(ApiError, match="no job"):
            await gesso.cancel("nobody")
