"""What comes with a request is kept by the broker only where the request is let in."""

import base64
import hashlib
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx2
import numpy as np
import pytest
from gesso_contracts import BlobRef
from gesso_core.errors import NotFound
from gesso_core.pipelines.pictures import encode_picture
from gesso_services.gateway.uploads import INLINE_BYTES_PER_CALL, INLINE_BYTES_PER_JOB

pytestmark = pytest.mark.broker

VARIATIONS = "/v1/images/variations"
JUDGEMENTS = "/v1/judgements"
CHAT = "/v1/chat/completions"
Send = Callable[[httpx2.Client, bytes], httpx2.Response]


def noise(seed: int) -> bytes:
    """A picture that is too large for a message."""
    data = encode_picture(
        np.random.default_rng(seed).integers(0, 255, (480, 480, 3), dtype=np.uint8)
    )
    assert len(data) > INLINE_BYTES_PER_JOB
    return data


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def is_kept(gateway: Any, data: bytes) -> bool:
    """Do these bytes lie in the broker?"""
    key = hashlib.sha256(data).hexdigest()
    ref = BlobRef(key=key, size=len(data), sha256=key, media_type="image/png")
    try:
        gateway.loop.run(gateway.app.state.fabric.blobs.get(ref))
    except NotFound:
        return False
    return True


def vary(http: httpx2.Client, data: bytes) -> httpx2.Response:
    fields = {"model": "vilau-tiny", "keep": "0"}
    return http.post(VARIATIONS, files={"image": data}, data=fields)


def ask(http: httpx2.Client, data: bytes) -> httpx2.Response:
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(data)}"}}
    return http.post(CHAT, json={"messages": [{"role": "user", "content": [shown]}]})


def put(http: httpx2.Client, kind: str, request: dict[str, Any]) -> httpx2.Response:
    return http.put(f"/v1/jobs/upload-{uuid4().hex}", json={"kind": kind, "request": request})


def payload(data: bytes) -> dict[str, str]:
    return {"kind": "inline", "data": text_of(data), "media_type": "image/png"}


def put_variation(http: httpx2.Client, data: bytes) -> httpx2.Response:
    drawn = {"model": "vilau-tiny", "prompt": "x", "width": 64, "height": 64, "seed": 1}
    return put(http, "vary-image", drawn | {"image": payload(data), "keep": 0})


def put_question(http: httpx2.Client, data: bytes) -> httpx2.Response:
    turn = {"role": "user", "parts": [{"kind": "image", "image": payload(data)}]}
    return put(http, "answer", {"model": "vilau-tiny", "turns": [turn]})


@pytest.fixture(scope="module")
def full(start_gateway: Any) -> Any:
    """A gateway that takes one job and never sees that it is done."""
    gateway = start_gateway(max_queue_depth=1, depth_ttl_s=1e6)
    with httpx2.Client(base_url=gateway.url, timeout=30) as http:
        http.post("/v1/images/generations", json={"prompt": "x", "model": "vilau-tiny"})
    return gateway


@pytest.mark.parametrize("send", [vary, ask, put_variation, put_question])
def test_nothing_is_kept_of_a_request_that_finds_the_queue_full(
    full: Any, http: httpx2.Client, server: Any, send: Send
) -> None:
    data = noise(seed=len(send.__name__))
    with httpx2.Client(base_url=full.url, timeout=30) as busy:
        answer = send(busy, data)
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full"), answer.text
    assert not is_kept(server, data)
    assert send(http, data).status_code in (200, 202)
    assert is_kept(server, data)


@pytest.mark.parametrize("send", [vary, ask, put_variation, put_question])
def test_what_is_refused_for_its_upload_takes_no_place_in_the_queue(
    start_gateway: Any, send: Send
) -> None:
    gateway = start_gateway(max_queue_depth=4, depth_ttl_s=1e6)
    with httpx2.Client(base_url=gateway.url, timeout=30) as http:
        for _ in range(5):
            answer = send(http, b"junk")
            assert (answer.status_code, answer.json()["code"]) == (422, "unreadable_image")


def test_a_variation_with_a_wrong_field_leaves_no_picture(http: httpx2.Client, server: Any) -> None:
    data = noise(seed=1)
    for fields in ({"keep": "4"}, {"size": "640x640"}, {"seed": str(2**63 - 1), "n": "2"}):
        answer = http.post(VARIATIONS, files={"image": data}, data=fields)
        assert (answer.status_code, answer.json()["field"]) == (422, next(iter(fields)))
    assert not is_kept(server, data)


def test_a_prompt_too_long_for_the_judge_is_refused_before_its_pictures_are_kept(
    http: httpx2.Client, server: Any
) -> None:
    data = noise(seed=2)
    assert 8 * len(data) > INLINE_BYTES_PER_CALL
    body = {"prompt": "x " * 1500, "images": [text_of(data)] * 8}
    answer = http.post(JUDGEMENTS, json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, "prompt")
    assert not is_kept(server, data)
    assert http.post(JUDGEMENTS, json=body | {"prompt": "noise"}).status_code == 200
    assert is_kept(server, data)
