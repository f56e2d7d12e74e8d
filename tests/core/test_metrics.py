"""PSNR and SSIM against values that can be worked out by hand or from a second formulation."""

import numpy as np
import pytest
import torch
from gesso_core.metrics import MAX_PSNR_DB, psnr, ssim


def noise(seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_error_is_the_textbook_value() -> None:
    picture = torch.zeros(1, 3, 16, 16)
    assert psnr(picture + 0.2, picture).item() == pytest.approx(10 * np.log10(4 / 0.04), abs=1e-4)


def test_psnr_of_equal_pictures_is_the_ceiling() -> None:
    assert psnr(noise(), noise()).tolist() == [MAX_PSNR_DB, MAX_PSNR_DB]


def test_psnr_clamps_both_sides_to_the_range_of_pictures() -> None:
    assert psnr(noise() * 0 + 3, noise() * 0 + 1).tolist() == [MAX_PSNR_DB, MAX_PSNR_DB]


def test_ssim_of_equal_pictures_is_one() -> None:
    assert ssim(noise(), noise()).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_ssim_matches_the_definition_on_one_window() -> None:
    x, y = noise(1, side=11)[:1], noise(2, side=11)[:1]
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    expected = []
    for a, b in zip(x[0].double().numpy(), y[0].double().numpy(), strict=True):
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
        covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 0.02**2, 0.06**2
        expected.append(
            (2 * mean_a * mean_b + c1)
            * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert ssim(x, y).item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_ssim_falls_with_noise() -> None:
    picture = noise(3) * 0.5
    little, much = (ssim(picture + s * noise(4), picture).mean() for s in (0.1, 0.5))
    assert 1 > little > much
