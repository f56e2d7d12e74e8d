"""Pictures of quantized models beside those of the model as it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.models.dc_ae import Encoder
from gesso_core.pipelines.load import load_denoiser, load_its_autoencoder
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.ptq import quality
from gesso_core.ptq.driver import quantize_model
from gesso_core.ptq.naive import naive_layer, round_plainly
from gesso_core.ptq.picture_grid import picture_grid
from gesso_core.ptq.prompts import default_prompts
from gesso_core.ptq.quality import AS_IS, NAIVE, compare, perceptual_distance, table, versions
from gesso_core.quant.reference import svdquant_linear_ref


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_dc_ae(resolve("dcae-tiny")).encoder


def pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_the_perceptual_distance_grows_with_the_damage(encoder: Encoder) -> None:
    exact = pictures(4)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    assert perceptual_distance(encoder, exact, exact).eq(0).all()
    small, large = (perceptual_distance(encoder, exact, exact + s * noise) for s in (0.05, 0.4))
    assert (small > 0).all()
    assert (2 * small < large).all()


def test_a_naive_layer_is_only_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 128, generator=generator), torch.ones(32)
    layer = naive_layer(weight, bias, weight="int4", activation="int4")
    assert layer.rank == 0
    assert layer.smooth.eq(1).all()
    x = torch.randn(64, 128, generator=generator)
    exact = x @ weight.T + bias
    error = (svdquant_linear_ref(layer, x) - exact).norm() / exact.norm()
    assert 0.08 < error < 0.2


def test_pictures_are_laid_out_by_version_and_prompt() -> None:
    sheet = picture_grid({"16 bit": pictures(3), "naive W4A4": pictures(3)}, ["a cat", "b", "c"])
    cell = 2 * 64 + 4
    assert sheet.width == 90 + 3 * cell
    last = sheet.crop((90 + 2 * cell, sheet.height - cell, 90 + 2 * cell + 128, sheet.height - 4))
    expected = ((pictures(3)[2].clamp(-1, 1) + 1) * 127.5).round()[:, ::8, ::8]
    shown = torch.from_numpy(np.array(last.resize((64, 64), 0)))
    torch.testing.assert_close(shown.permute(2, 0, 1)[:, ::8, ::8].float(), expected)


def test_versions_are_measured_against_the_model_as_it_is() -> None:
    autoencoder, naive = load_its_autoencoder("sana-tiny"), load_denoiser("sana-tiny")
    round_plainly(naive.model, weight="int4", activation="int4")
    pipelines = {
        AS_IS: TextToImage(load_denoiser("sana-tiny"), autoencoder),
        NAIVE: TextToImage(naive, autoencoder),
    }
    qualities = compare(pipelines, limit=1)
    exact, rounded = qualities[AS_IS], qualities[NAIVE]
    assert exact.psnr_db is None
    assert exact.pictures == 2
    assert rounded.psnr_db is not None
    assert 10 < rounded.psnr_db < 35
    assert rounded.ssim is not None
    assert 0.1 < rounded.ssim < 0.98
    assert rounded.perceptual is not None
    assert 0.005 < rounded.perceptual < 2
    assert rounded.weight_bytes < 0.5 * exact.weight_bytes
    assert f"| naive W4A4 | {rounded.weight_bytes:,} | {rounded.psnr_db:.2f} |" in table(qualities)


@pytest.mark.slow
def test_svdquant_is_closer_to_the_exact_pictures_than_plain_rounding(tmp_path: Path) -> None:
    for to in ("int4", "w8a8"):
        quantize_model(
            "sana-tiny",
            tmp_path / to,
            to=to,  # type: ignore[arg-type]
            rank=16,
            prompts=default_prompts("sana-tiny", 16),
            steps=4,
            captured=tmp_path / "captured",
        )
    qualities = compare(versions([tmp_path / "int4", tmp_path / "w8a8"]), limit=8)
    int4, w8a8, naive = (qualities[name] for name in ("int4", "w8a8", NAIVE))
    assert int4.psnr_db is not None
    assert w8a8.psnr_db is not None
    assert naive.psnr_db is not None
    assert w8a8.psnr_db - 8 > int4.psnr_db > naive.psnr_db + 1.5
    assert int4.perceptual is not None
    assert naive.perceptual is not None
    assert int4.perceptual < 0.75 * naive.perceptual


def test_a_model_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--models", "nowhere"])
    assert "nowhere is not a folder; give a model folder or a name" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_grid_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "GRID_PROMPTS", ("a dog", "a castle"))
    words = ["--models", "--limit", "1", "--out", str(tmp_path / "grid.png")]
    assert quality.main([*words, "--json", str(tmp_path / "numbers.json")]) == 0
    assert "| naive W4A4 |" in capsys.readouterr().out
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(numbers) == {AS_IS, NAIVE}
