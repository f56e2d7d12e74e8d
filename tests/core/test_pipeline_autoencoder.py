"""Pixels through the autoencoder: any size in, the right size out, nonsense refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import InvalidRequest, NumericalError, WeightsError
from gesso_core.pipelines.autoencoder import Autoencoder, to_pixels
from torch import nn


@pytest.fixture(scope="module")
def autoencoder(tiny_pipeline: Path) -> Autoencoder:
    return Autoencoder.load(tiny_pipeline)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_value_of_a_pixel_survives_the_way_to_the_network_and_back(
    autoencoder: Autoencoder,
) -> None:
    pixels = np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    assert np.array_equal(to_pixels(autoencoder._signal(pixels)[0]), pixels)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 70), (16, 1), (17, 48)])
def test_a_picture_of_any_size_has_a_latent_of_whole_cells(
    autoencoder: Autoencoder, height: int, width: int
) -> None:
    latent = autoencoder.encode(noise(height, width))
    assert latent.shape == (8, -(-height // 16), -(-width // 16))
    assert latent.dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(64, 48), (37, 100), (11, 12)])
def test_a_reconstruction_has_the_size_of_the_picture(
    autoencoder: Autoencoder, height: int, width: int
) -> None:
    made = autoencoder.reconstruct(noise(height, width))
    assert made.pixels_HWC.shape == (height, width, 3)
    assert made.psnr_db > 0
    assert -1 <= made.ssim <= 1


def test_a_picture_too_small_to_measure_is_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(InvalidRequest, match=r"40x10 is too small.*at least 11"):
        autoencoder.reconstruct(noise(10, 40))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 37), (1, 1), (200, 150)])
def test_a_latent_is_decoded_at_exactly_the_wanted_size(
    autoencoder: Autoencoder, height: int, width: int
) -> None:
    pixels = autoencoder.decode(torch.randn(8, 4, 4), height=height, width=width)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("latent", "complaint"),
    [
        (torch.zeros(7, 4, 4), r"shape \(7, 4, 4\); .* decodes \(8, height, width\)"),
        (torch.zeros(8, 4), r"shape \(8, 4\)"),
        (torch.zeros(8, 0, 4), r"shape \(8, 0, 4\)"),
        (torch.full((8, 4, 4), float("nan")), "or with NaN"),
        (torch.zeros(8, 4, 4, dtype=torch.int32), "type int32"),
        (torch.zeros(8, 300, 300), "4800x4800 pixels; at most 16,777,216"),
    ],
    ids=["channels", "rank", "empty", "nan", "whole-numbers", "too-large"],
)
def test_a_latent_that_is_none_is_refused(
    autoencoder: Autoencoder, latent: torch.Tensor, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        autoencoder.decode(latent)
    assert refusal.value.field == "latent"


def test_a_model_that_makes_nan_raises_instead_of_painting(tiny_pipeline: Path) -> None:
    broken = Autoencoder.load(tiny_pipeline)
    nn.init.constant_(next(broken.model.decoder.parameters()), float("nan"))
    with pytest.raises(NumericalError, match="picture with NaN"):
        broken.decode(torch.zeros(8, 4, 4))


def test_a_folder_that_is_none_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a folder"):
        Autoencoder.load(tmp_path / "nothing")
