"""Four bits and LoRAs through the whole stack: what a request names is what its picture gets."""

import concurrent.futures
import io

import numpy as np
import pytest
from gesso_services.client import Gesso
from numpy.typing import NDArray
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

PROMPT = "a red apple, 3D style, on a blue background"
MODEL = "sana-tiny-int4"
# The shipped LoRA takes the color away.
STRENGTHS = (None, 0.3, 0.6, 1.0)


def pixels(gesso: Gesso, strength: float | None, seed: int = 7) -> NDArray[np.int16]:
    loras = None if strength is None else {"ink": strength}
    (made,) = gesso.generate(PROMPT, model=MODEL, size="64x64", seed=seed, loras=loras)
    assert made.metadata["quantization"].startswith("svdquant-int4-r16")
    assert [use["strength"] for use in made.metadata["loras"]] == ([strength] if loras else [])
    return np.asarray(Image.open(io.BytesIO(made.data)).convert("RGB"), dtype=np.int16)


def color(picture: NDArray[np.int16]) -> float:
    """How far the channels of a pixel are apart, on average."""
    return float((picture.max(axis=2) - picture.min(axis=2)).mean())


def test_loras_in_flight_do_not_mix_and_their_strength_counts(stack) -> None:
    def draw(strength: float | None) -> NDArray[np.int16]:
        with stack.client() as gesso:
            return pixels(gesso, strength)

    alone = [draw(strength) for strength in STRENGTHS]
    with concurrent.futures.ThreadPoolExecutor(len(STRENGTHS)) as pool:
        together = list(pool.map(draw, STRENGTHS))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    colors = [color(picture) for picture in alone]
    assert colors == sorted(colors, reverse=True)
    assert colors[-1] < 0.2 * colors[0]


def test_mode_and_memory_of_a_quantized_model_are_told(stack) -> None:
    with stack.client() as gesso:
        (model,) = (one for one in gesso.models() if one["id"] == MODEL)
    assert model["quantization"] == "svdquant-int4-r16 (dequantized)"
    assert model["weight_bytes"] > 0
