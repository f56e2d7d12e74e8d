"""The small models that ship, through the services as they start without any setting."""

from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from gesso_contracts import conversations as c
from gesso_contracts import messages as m
from gesso_contracts.blobs import Inline
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_services import autoencoder, autoregressive
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost, ServiceSpec

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]


@pytest.fixture
async def shipped(start_service: Start) -> ServiceHost:
    await start_service(autoencoder.build_service())
    return await start_service(autoregressive.build_service())


async def draw(store: JobStore, bus: Bus, model: str, prompt: str, seed: int = 1) -> Pixels:
    wish = m.GenerateImage(model=model, prompt=prompt, width=64, height=64, seed=seed)
    state, _ = await store.submit("autoregressive", "generate-image", wish)
    state = await wait_for(store, state.id, 60)
    assert state.status == "succeeded", state.problem
    image = m.ImageReady.model_validate(state.result).image
    return decode_picture(await BlobStore(bus).get(image))


@pytest.mark.slow
async def test_what_one_model_draws_the_other_recognizes(
    shipped: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    prompts = (
        "a red apple, 3D style, on a blue background",
        "a cat, 3D style, on a green background",
    )
    pictures = [await draw(store, gateway, "hart-tiny", prompt) for prompt in prompts]
    assert min(picture.std() for picture in pictures) > 20
    images = [Inline(data=encode_picture(p), media_type="image/png") for p in pictures]
    scores = []
    for prompt in ("a red apple", "a cat"):
        request = c.JudgeImages(model="vilau-tiny", prompt=prompt, images=images)
        judged = await call(gateway, "autoregressive", "judge", request, c.ImagesJudged)
        scores.append(judged.scores)
    right = scores[0][0] + scores[1][1]
    wrong = scores[0][1] + scores[1][0]
    assert right > wrong + 0.5


@pytest.mark.slow
async def test_the_small_model_draws_and_names_a_color(
    shipped: ServiceHost, store: JobStore, gateway: Bus
) -> None:
    picture = await draw(store, gateway, "vilau-tiny", "a cat, 3D style, on a green background")
    corner = picture[:6, :6].reshape(-1, 3).mean(axis=0)
    assert int(np.argmax(corner)) == 1
    image = Inline(data=encode_picture(picture), media_type="image/png")
    parts: list[c.Part] = [
        c.ImagePart(image=image),
        c.TextPart(text="which color is the background?"),
    ]
    turn = c.AnswerTurn(model="vilau-tiny", turns=[c.Turn(role="user", parts=parts)])
    state, _ = await store.submit("autoregressive", "answer", turn)
    state = await wait_for(store, state.id, 60)
    answer = c.TurnAnswered.model_validate(state.result)
    assert "green" in answer.text.lower()
    assert answer.finish_reason == "stop"
