"""The Python client against a real gateway: pictures, progress, jobs, and errors as sentences."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from gesso_contracts import JobProgress, JobStateChanged
from gesso_core.pipelines.pictures import decode_picture, encode_picture
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


def test_models_and_readiness(gesso: Gesso) -> None:
    assert {model["id"] for model in gesso.models()} == {"sana-tiny", "dcae-tiny"}
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
        with pytest.raises(ApiError, match="no job"):
            await gesso.cancel("nobody")
