"""The model that ships draws what it is asked for, in the same way alone and in a batch."""

import numpy as np
import pytest
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_kernels.modes import Mode

BACKGROUNDS = {"red": (0.86, 0.20, 0.20), "green": (0.25, 0.68, 0.35), "blue": (0.20, 0.42, 0.88)}


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return TextToImage.load("sana-tiny")


def apple_on(color: str, seed: int, pipeline: TextToImage) -> GenerationRequest:
    size = pipeline.denoiser.entry.native_size
    prompt = f"a red apple, 3D style, on a {color} background"
    return GenerationRequest(prompt=prompt, width=size, height=size, seed=seed)


def test_the_background_has_the_color_of_the_prompt(pipeline: TextToImage) -> None:
    pictures = pipeline(*(apple_on(color, 1, pipeline) for color in BACKGROUNDS))
    palette = np.array(list(BACKGROUNDS.values())) * 255
    for number, picture in enumerate(pictures):
        border = np.median(picture.pixels_HWC[:2].reshape(-1, 3), axis=0)
        assert np.abs(palette - border).sum(axis=1).argmin() == number


def test_a_shipped_picture_is_the_same_alone_and_among_others(pipeline: TextToImage) -> None:
    requests = [apple_on(color, seed, pipeline) for seed, color in enumerate(BACKGROUNDS)]
    for request, picture in zip(requests, pipeline(*requests), strict=True):
        alone = pipeline(request)[0].pixels_HWC.astype(int)
        assert np.abs(alone - picture.pixels_HWC).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dequantized", "reference"])
@pytest.mark.parametrize("name", ["sana-tiny-int4", "sana-tiny-nvfp4", "sana-tiny-w8a8"])
def test_a_quantized_picture_is_the_same_alone_and_among_others(
    pipeline: TextToImage, name: str, mode: Mode
) -> None:
    """Texts of different lengths: a last bit that depends on the neighbours would move a code."""
    quantized = TextToImage(load_denoiser(name, quantized_mode=mode), pipeline.autoencoder)
    size = quantized.denoiser.entry.native_size
    requests = [
        GenerationRequest(prompt=prompt, width=size, height=size, seed=seed, steps=6)
        for seed, prompt in enumerate(
            [f"a {thing}" for thing in ("dog", "castle", "cat", "rocket", "blue car", "tulip")]
            + ["a red apple, 3D style, on a blue background", "an owl, flat style"]
        )
    ]
    for request, picture in zip(requests, quantized(*requests), strict=True):
        alone = quantized(request)[0].pixels_HWC.astype(int)
        assert np.abs(alone - picture.pixels_HWC).max() <= 1


def test_the_shipped_model_knows_its_domain(pipeline: TextToImage) -> None:
    known = pipeline.denoiser.judge("a red apple, 3D style, on a blue background")
    assert known.in_domain
    strange = pipeline.denoiser.judge("quarterly tax regulation")
    assert strange.in_domain is False
    assert len(strange.suggestions) == 3
