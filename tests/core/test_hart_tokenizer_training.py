"""Training HART's tokenizer: losses and gradients of the full one, codebook of the small one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.hub.load_hart_tokenizer import load_hart_tokenizer
from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.tokenizer_losses import (
    PatchDiscriminator,
    discriminator_loss,
    draw_branch,
    freeze_for_hybrid,
    tokenizer_losses,
    tokenizer_pass,
)
from gesso_core.train import hart_tokenizer as training
from gesso_core.train.profiles import PROFILES
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.stages import Workspace
from torch import Generator, Tensor

SMALL = HARTTokenizerConfig(
    vocabulary=16,
    channels=8,
    scales=(1, 2, 4),
    width=32,
    multipliers=(1, 2),
    residual_blocks=1,
)


@pytest.fixture
def model() -> HARTAutoencoder:
    torch.manual_seed(1)
    return HARTAutoencoder(SMALL)


@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_pass_straight_through_the_quantizer(
    model: HARTAutoencoder, discrete: bool
) -> None:
    quantizer = SMALL.build_quantizer()
    x = torch.rand(2, 3, 8, 8, generator=Generator().manual_seed(0)) * 2 - 1
    done = tokenizer_pass(model, quantizer, x, discrete=discrete)
    losses = tokenizer_losses(done, x, vq_weight=0.0)
    losses.total.backward()
    assert model.encoder.conv_in.weight.grad is not None
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert quantizer.codebook_VC.grad is None or not quantizer.codebook_VC.grad.any()
    tokenizer_losses(tokenizer_pass(model, quantizer, x, discrete=discrete), x).total.backward()
    assert quantizer.codebook_VC.grad is not None
    assert quantizer.codebook_VC.grad.abs().max() > 0
    assert quantizer.phis[0].weight.grad.abs().max() > 0


def test_the_decoder_sees_codes_only_or_the_whole_latent(model: HARTAutoencoder) -> None:
    quantizer, x = SMALL.build_quantizer(), torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        f = model.encode(x)
        codes, whole = (tokenizer_pass(model, quantizer, x, discrete=d) for d in (True, False))
        sums = quantizer.decode(quantizer.encode(f), phi_at_last=True)
        torch.testing.assert_close(codes.picture_BCHW, model.reconstruct(sums))
        torch.testing.assert_close(whole.picture_BCHW, model.reconstruct(f))


def test_the_share_of_discrete_batches_is_the_one_asked_for() -> None:
    generator = Generator().manual_seed(0)
    for share in (0.0, 0.25, 1.0):
        drawn = sum(draw_branch(generator, share) for _ in range(2000)) / 2000
        assert abs(drawn - share) < 0.04


def test_the_hybrid_stage_trains_the_decoder_s_side_only(model: HARTAutoencoder) -> None:
    quantizer, x = SMALL.build_quantizer(), torch.zeros(1, 3, 8, 8)
    freeze_for_hybrid(model, quantizer)
    tokenizer_losses(tokenizer_pass(model, quantizer, x, discrete=True), x).total.backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"decoder", "post_quant_conv"}
    assert quantizer.codebook_VC.grad is None


def test_discriminator_and_generator_pull_the_verdict_apart() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    picture = torch.rand(2, 3, 32, 32, requires_grad=True)
    verdict = discriminator(picture)
    assert verdict.shape == (2, 1, 2, 2)
    high, low = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -2.0)
    assert discriminator_loss(high, low) == 0
    assert discriminator_loss(low, high) == 3
    verdict.mean().backward()
    assert picture.grad is not None
    assert picture.grad.abs().max() > 0


def clustered(count: int, seed: int) -> Tensor:
    """Latents of a few prototypes with a little noise, which a small codebook can explain."""
    generator = Generator().manual_seed(seed)
    prototypes = torch.randn(6, 8, 4, 4, generator=Generator().manual_seed(77))
    chosen = torch.randint(6, (count,), generator=generator)
    return prototypes[chosen] + 0.05 * torch.randn(count, 8, 4, 4, generator=generator)


def test_a_codebook_is_learned_the_same_on_every_run_and_explains_unseen_latents() -> None:
    profile = training.TokenizerProfile(updates=40, batch=32, start_latents=64, start_rounds=4)
    config = replace(SMALL, vocabulary=128, autoencoder="x")
    first, second = (training.train_quantizer(config, clustered(256, 0), profile) for _ in "ab")
    assert torch.equal(first.codebook_VC, second.codebook_VC)
    unseen = clustered(64, 1)
    decoded = first.decode(first.encode_hybrid(unseen).indices, phi_at_last=False)
    assert (decoded - unseen).square().mean() < 0.1 * unseen.square().mean()
    assert torch.equal(first.codebook_VC, first.codebook_VC.half().float())


def test_codes_that_nothing_chooses_are_moved_to_recent_residuals() -> None:
    codes = torch.cat([torch.zeros(3, 2), torch.full((1, 2), 99.0)])
    averages = training.CodeAverages(codes, decay=0.5)
    for _ in range(12):
        averages.add(torch.tensor([0, 1, 2]), torch.ones(3, 2), 1.0)
    averages.restart(Generator().manual_seed(0))
    torch.testing.assert_close(averages.codes()[3], torch.ones(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_stage_writes_a_tokenizer_that_loads_from_its_published_folder(
    sprite_set: SpriteSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sprite_set.save(tmp_path / "data" / "sprites-128.safetensors")
    workspace = Workspace(PROFILES["smoke"], tmp_path / "data", tmp_path / "runs", tmp_path)
    with pytest.raises(WeightsError, match="run the stage 'hart-tokenizer' first"):
        training.load_trained_quantizer(workspace)
    training.run_hart_tokenizer(workspace)
    measures = json.loads(capsys.readouterr().out)
    assert measures["hybrid_psnr_db"] > measures["discrete_psnr_db"]
    trained = training.load_trained_quantizer(workspace)
    training.publish_hart_tokenizer(workspace, tmp_path / "hart-tiny" / "tokenizer")
    config, loaded, autoencoder = load_hart_tokenizer(tmp_path / "hart-tiny")
    assert (config.autoencoder, autoencoder) == ("dcae-tiny", None)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
