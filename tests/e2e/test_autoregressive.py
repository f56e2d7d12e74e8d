"""HART and VILA-U through the whole stack: drawing, seeing, judging, with OpenAI's own client."""

import base64
import concurrent.futures
import io
import time
import uuid

import numpy as np
import openai
import pytest
from gesso_core.pipelines.pictures import Pixels, decode_picture
from gesso_services.client import Gesso
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

APPLE = "a red apple, 3D style, on a blue background"
# Seeds, prompts and strengths of guidance that all differ, for both models in turn.
CROWD = [
    ("hart-tiny", APPLE, 1, None),
    ("vilau-tiny", APPLE, 2, None),
    ("hart-tiny", "a car", 3, 1.0),
    ("vilau-tiny", "a cat on a green background", 4, 1.0),
    ("hart-tiny", "a house, flat style, on a yellow background", 5, 4.0),
    ("hart-tiny", "a dog", 6, None),
]


def draw(stack, model: str, prompt: str, seed: int, guidance: float | None = None) -> Pixels:
    with stack.client() as gesso:
        (made,) = gesso.generate(
            prompt, model=model, size="64x64", seed=seed, guidance_scale=guidance
        )
    return decode_picture(made.data)


def data_url(picture: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client: openai.OpenAI, picture: Pixels, question: str, **options) -> list[str]:
    """The pieces of a streamed answer."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": question},
    ]
    stream = client.chat.completions.create(
        model="vilau-tiny", messages=[{"role": "user", "content": parts}], stream=True, **options
    )
    return [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]


@pytest.fixture
def client(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_mixed_crowd_gets_what_each_would_get_alone(stack) -> None:
    alone = [draw(stack, *wish) for wish in CROWD]
    with concurrent.futures.ThreadPoolExecutor(len(CROWD)) as pool:
        together = list(pool.map(lambda wish: draw(stack, *wish), CROWD))
    for wish, one, other in zip(CROWD, alone, together, strict=True):
        assert np.array_equal(one, other), wish


@pytest.mark.parametrize("model", ["hart-tiny", "vilau-tiny"])
def test_previews_come_on_the_way(stack, model: str) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        events = client.images.generate(
            model=model, prompt=APPLE, stream=True, partial_images=3, extra_body={"seed": 7}
        )
        names = [event.type.rpartition(".")[2] for event in events]
    assert "partial_image" in names
    assert names[-1] == "completed"


def test_a_caption_is_streamed_and_an_answer_is_about_the_picture(stack, client) -> None:
    picture = draw(stack, "sana-tiny", APPLE, 7)
    pieces = ask(client, picture, "describe the picture")
    caption = "".join(pieces)
    assert sum(piece != "" for piece in pieces) >= 2
    assert "apple" in caption
    assert "blue" in "".join(ask(client, picture, "which color is the background?"))


def test_the_judge_prefers_what_was_asked_for(stack) -> None:
    files = []
    for prompt in (APPLE, "a car, 3D style, on a white background"):
        with stack.client() as gesso:
            files += [made.data for made in gesso.generate(prompt, model="sana-tiny", seed=1)]
    with stack.client() as gesso:
        apple, car = gesso.judge("a red apple", *files)
        best, worst = gesso.generate(APPLE, model="hart-tiny", seed=1, n=2, best_of=4)
    assert apple > car
    assert best.score >= worst.score


def test_a_picture_is_cancelled_between_two_scales(stack) -> None:
    """A long queue keeps the model busy, so that there is a time between scales."""
    wish = {"model": "hart-tiny", "prompt": APPLE, "width": 64, "height": 64}
    ids = [f"ar-{uuid.uuid4().hex[:12]}" for _ in range(24)]
    with stack.client() as gesso:
        for seed, job_id in enumerate(ids):
            gesso.submit(job_id, wish | {"seed": seed})
        gesso.cancel(ids[-1])
        states = [wait(gesso, job_id) for job_id in ids]
        (made,) = gesso.generate(APPLE, model="hart-tiny", size="64x64", seed=3)
    assert states[-1].status == "cancelled"
    assert {state.status for state in states[:-1]} == {"succeeded"}
    assert made.data


def wait(gesso: Gesso, job_id: str, timeout: float = 90.0):
    deadline = time.monotonic() + timeout
    while not (state := gesso.job(job_id)).is_final:
        if time.monotonic() > deadline:
            pytest.fail(f"job {job_id} is still {state.status} after {timeout:.0f} s")
        time.sleep(0.1)
    return state


def test_a_killed_replica_loses_neither_picture_nor_answer(stack, wait_until) -> None:
    expected = draw(stack, "vilau-tiny", APPLE, 11)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pictures = [pool.submit(draw, stack, "vilau-tiny", APPLE, 11) for _ in range(4)]
        stack.replicas("autoregressive")[0].kill()
        for picture in pictures:
            assert np.array_equal(picture.result(120), expected)
    wait_until(lambda: bool(stack.replicas("autoregressive")), 60, "a replica is back")
