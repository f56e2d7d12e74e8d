"""``/v1/models``: what the services tell of the models that they have loaded."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gesso_services.runtime.service import ServiceSpec

pytestmark = pytest.mark.broker

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def test_mode_and_memory_of_a_model_are_shown(http: httpx2.Client) -> None:
    model = http.get("/v1/models/sana-tiny").json()
    assert model["quantization"] == "svdquant-int4-r32 (dequantized)"
    assert model["weight_bytes"] == 14_000_000


def test_a_service_that_tells_nothing_is_shown_without(http: httpx2.Client) -> None:
    model = http.get("/v1/models/dcae-tiny").json()
    assert (model["quantization"], model["weight_bytes"]) == (None, None)


def test_all_that_a_model_can_do_is_shown_beside_its_main_task(http: httpx2.Client) -> None:
    tasks = {model["id"]: model["tasks"] for model in http.get("/v1/models").json()["data"]}
    assert tasks["hart-tiny"] == ["text-to-image"]
    assert tasks["vilau-tiny"] == ["image-to-text", "text-to-image"]
    assert tasks["dcae-tiny"] == ["autoencoder"]
    assert http.get("/v1/models/vilau-tiny").json()["task"] == "image-to-text"


def test_a_folder_does_what_its_service_says(http: httpx2.Client) -> None:
    model = http.get("/v1/models/from-a-folder").json()
    assert (model["tasks"], model["default_size"]) == (["text-to-image"], "128x128")
    assert (model["steps"], model["weight_bytes"]) == (4, 6_000_000)
    wish = {"model": "from-a-folder", "prompt": "a red apple"}
    assert http.post("/v1/images/generations", json=wish).json()["size"] == "128x128"
    asked = {"model": "from-a-folder", "messages": [{"role": "user", "content": "hello"}]}
    refused = http.post("/v1/chat/completions", json=asked)
    assert "cannot answer in a chat here; use vilau-tiny" in refused.json()["detail"]


@pytest.mark.parametrize("name", ["hart-tiny", "vilau-tiny"])
def test_a_model_that_draws_shows_how(http: httpx2.Client, name: str) -> None:
    model = http.get(f"/v1/models/{name}").json()
    assert (model["default_size"], model["sizes"], model["steps"]) == ("64x64", ["64x64"], 4)


@pytest.mark.anyio
async def test_all_who_ask_first_at_once_hear_of_every_service(start_gateway: Any) -> None:
    gateway = start_gateway(required_services=("diffusion",))
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=30) as http:
        answers = await asyncio.gather(*(http.get("/v1/models") for _ in range(8)))
    for answer in answers:
        assert "hart-tiny" in {model["id"] for model in answer.json()["data"]}


@pytest.mark.parametrize(
    ("required", "shown"),
    [(("autoencoder", "diffusion"), False), (("diffusion", "autoregressive"), True)],
    ids=["not required", "required"],
)
def test_a_service_that_has_never_answered_counts_when_it_has_to_be_there(
    start_services: Any, new_specs: Any, tmp_path: Path, required: tuple[str, ...], shown: bool
) -> None:
    def without_the_seer() -> list[ServiceSpec]:
        return [spec for spec in new_specs() if spec.name != "autoregressive"]

    start = start_services(tmp_path, without_the_seer, required_services=required, wait=not shown)
    with start as gateway, httpx2.Client(base_url=gateway.url) as http:
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert ("hart-tiny" in names) == shown
        if not shown:
            answer = http.post("/v1/chat/completions", json=HELLO)
            assert answer.status_code == 404
            assert "no model of this server can" in answer.json()["detail"]
            answer = http.post("/v1/videos", json={"prompt": "a kite"})
            assert answer.status_code == 404
            assert answer.json()["detail"].startswith("no model of this server can make a video;")
