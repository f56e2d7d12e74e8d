"""``/v1/models``: what the services tell of the models that they have loaded."""

import httpx2


def test_mode_and_memory_of_a_model_are_shown(http: httpx2.Client) -> None:
    model = http.get("/v1/models/sana-tiny").json()
    assert model["quantization"] == "svdquant-int4-r32 (dequantized)"
    assert model["weight_bytes"] == 14_000_000


def test_a_service_that_tells_nothing_is_shown_without(http: httpx2.Client) -> None:
    model = http.get("/v1/models/dcae-tiny").json()
    assert (model["quantization"], model["weight_bytes"]) == (None, None)
