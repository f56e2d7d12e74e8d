"""The models that ship draw on a GPU what they draw on a CPU, but for rounding.

A picture may differ where a sum in another order moves a code over an edge, so that these tests ask
for closeness in dB and not for equal bytes. Where there is no GPU they are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.metrics import psnr
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.load import load_denoiser, load_its_autoencoder
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.pipelines.vila_u_load import load_vila_u
from gesso_kernels.modes import Mode, possible_modes
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
PROMPTS = (
    "a red apple, 3D style, on a blue background",
    "a cat, flat style, on a green background",
    "a castle",
)


def folder(name: str) -> Path:
    try:
        return resolve(name)
    except WeightsError as error:
        pytest.skip(error.message)


def requests(size: int = 64) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt=prompt, width=size, height=size, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]


def decibels(got: Pixels, expected: Pixels) -> float:
    error = np.mean((got.astype(float) - expected.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def drawn(pipeline: TextToImage) -> list[Pixels]:
    return [picture.pixels_HWC for picture in pipeline(*requests())]


@pytest.fixture(scope="module")
def on_cpu() -> list[Pixels]:
    return drawn(TextToImage.load("sana-tiny"))


def test_sana_in_fp32_draws_the_same_pictures(on_cpu: list[Pixels]) -> None:
    pipeline = TextToImage(
        load_denoiser("sana-tiny", dtype=torch.float32, device=GPU),
        load_its_autoencoder("sana-tiny", dtype=torch.float32, device=GPU),
    )
    for got, expected in zip(drawn(pipeline), on_cpu, strict=True):
        assert decibels(got, expected) > 40


def test_sana_as_a_gpu_serves_it_draws_the_same_pictures(on_cpu: list[Pixels]) -> None:
    for got, expected in zip(drawn(TextToImage.load("sana-tiny", device=GPU)), on_cpu, strict=True):
        assert decibels(got, expected) > 25


@pytest.mark.parametrize(
    "mode", [None, "w4a16", "w4a4_i8dot", "w4a8_prog", "w8a8_int8", "w8a8_fp8"]
)
@pytest.mark.parametrize("name", ["sana-tiny-int4", "sana-tiny-nvfp4", "sana-tiny-w8a8"])
def test_quantized_sana_draws_nearly_the_same_pictures(
    on_cpu: list[Pixels], name: str, mode: Mode | None
) -> None:
    folder(name)
    weight = {"int4": "int4", "nvfp4": "nvfp4", "w8a8": "int8"}[name.rsplit("-", 1)[1]]
    if mode is not None and mode not in possible_modes(weight, torch.cuda.get_device_capability()):
        pytest.skip(f"{mode} does not run {weight} here")
    autoencoder = TextToImage.load("sana-tiny", device=GPU).autoencoder
    quantized = TextToImage(load_denoiser(name, device=GPU, quantized_mode=mode), autoencoder)
    found = [decibels(a, b) for a, b in zip(drawn(quantized), on_cpu, strict=True)]
    assert min(found) > 15
    assert sum(found) / len(found) > 20


def test_the_autoencoder_reconstructs_as_on_a_cpu(on_cpu: list[Pixels]) -> None:
    pixels_BCHW = torch.from_numpy(np.stack(on_cpu)).permute(0, 3, 1, 2).float() / 127.5 - 1
    folder_of_it = folder("dcae-tiny")
    with torch.no_grad():
        plain, there = load_dc_ae(folder_of_it), load_dc_ae(folder_of_it).to(GPU)
        expected = plain.decode(plain.encode(pixels_BCHW))
        got = there.decode(there.encode(pixels_BCHW.to(GPU))).cpu()
    assert psnr(got, expected).min() > 40


def hart_latents(device: str) -> Tensor:
    folder("hart-tiny")
    pipeline = load_hart("hart-tiny", dtype=torch.float32, device=device)
    drafts = [pipeline.begin(pipeline.recipe(request)) for request in requests()]
    with torch.no_grad():
        while not drafts[0].done:
            drafts = pipeline.advance(drafts)
        return torch.stack([pipeline.latent(draft).cpu() for draft in drafts])


def test_hart_draws_the_same_pictures() -> None:
    got, expected = hart_latents(GPU), hart_latents("cpu")
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.median() < 0.01


def test_vila_u_draws_the_same_pictures() -> None:
    folder("vilau-tiny")
    features = []
    for device in (GPU, "cpu"):
        pipeline = load_vila_u("vilau-tiny", dtype=torch.float32, device=device)
        size = pipeline.entry.native_size
        drafts = [pipeline.begin(pipeline.recipe(request)) for request in requests(size)]
        with torch.no_grad():
            while not all(draft.done for draft in drafts):
                drafts = pipeline.advance(drafts)
            features.append(torch.stack([pipeline.latent(draft).cpu() for draft in drafts]))
    got, expected = features
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.median() < 0.01
