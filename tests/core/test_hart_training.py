"""Training HART: targets, losses, noise, and that a few steps learn something."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.models.hart.config import HART_CONFIGS
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.losses import (
    drop_ratio,
    kept_tokens,
    random_orders,
    sampled_codes,
    training_losses,
)
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.transformer import HART, without_text
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.train import hart_views
from gesso_core.train.__main__ import main
from gesso_core.train.denoiser import Batch
from gesso_core.train.hart import _text, batch_losses, weighted_loss
from gesso_core.train.hart_views import noisy_targets
from gesso_core.train.sprites import SpriteSet
from torch import Generator, Tensor

CONFIG = replace(HART_CONFIGS["hart-tiny"], depth=2, width=48, heads=2, vocabulary=64)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    made = MultiScaleQuantizer(vocabulary=64, channels=32, scales=CONFIG.scales)
    return made.eval().requires_grad_(False)


def new_model() -> HART:
    model = HART(CONFIG)
    initialize_weights(model, Generator().manual_seed(0))
    return model


def a_batch(samples: int = 4) -> Batch:
    mask = torch.arange(7) < torch.arange(2, 2 + samples)[:, None].clamp(max=7)
    return Batch(
        latent_BChw=numbers(samples, 32, 4, 4),
        text_BLS=numbers(samples, 7, 576, seed=1) * mask[..., None],
        mask_BL=mask,
    )


def test_a_few_steps_on_one_batch_learn_it(quantizer: MultiScaleQuantizer) -> None:
    model, generator, batch = new_model(), Generator().manual_seed(0), a_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        found = batch_losses(model, quantizer, batch, generator)
        loss = weighted_loss(found, CONFIG.scales)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append((float(found.cross_entropy_BM.detach().mean()), float(loss.detach())))
    assert losses[-1][0] < losses[0][0] - 0.5
    assert losses[-1][1] < losses[0][1] - 0.5


def test_equal_seeds_give_equal_losses(quantizer: MultiScaleQuantizer) -> None:
    model = new_model()
    one, other, third = (
        batch_losses(model, quantizer, a_batch(), Generator().manual_seed(seed)).total.detach()
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_without_noise_the_targets_are_those_of_the_tokenizer(
    quantizer: MultiScaleQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hart_views, "MOST_NOISE", 0.0)
    monkeypatch.setattr(hart_views, "MOST_WRONG", 0.0)
    latent = numbers(3, 32, 4, 4)
    targets = noisy_targets(quantizer, latent, Generator().manual_seed(0))
    codes = quantizer.encode_hybrid(latent)
    assert all(torch.equal(a, b) for a, b in zip(targets.indices, codes.indices, strict=True))
    torch.testing.assert_close(targets.rest_BNC, codes.rest_BNC)
    torch.testing.assert_close(targets.teacher_BMC, quantizer.teacher_inputs(codes.indices))


def test_wrong_codes_are_made_up_for_by_the_later_scales(quantizer: MultiScaleQuantizer) -> None:
    latent = numbers(64, 32, 4, 4)
    targets = noisy_targets(quantizer, latent, Generator().manual_seed(0))
    clean = quantizer.encode_hybrid(latent)
    changed = [
        float((a != b).float().mean()) for a, b in zip(targets.indices, clean.indices, strict=True)
    ]
    assert changed[0] < changed[-1] < 0.9
    # What is fed and what is left add up to the picture.
    fed = targets.teacher_BMC[:, -16:].mT.reshape(64, 32, 4, 4)
    torch.testing.assert_close(fed + targets.rest_BNC.mT.reshape(64, 32, 4, 4), latent)


def test_a_sample_without_text_looks_like_the_unconditional_row() -> None:
    model = HART(replace(CONFIG, text_dropout=0.999)).eval()
    text, empty = _text(model, a_batch(), Generator().manual_seed(0)), model.no_text(4)
    torch.testing.assert_close(text.slots_BLD, empty.slots_BLD)
    assert torch.equal(text.positions_BL, empty.positions_BL)


def test_text_is_left_out_as_often_as_asked() -> None:
    states = torch.ones(20_000, 1, 1)
    dropped = torch.rand(20_000, generator=Generator().manual_seed(0)) < 0.1
    assert float(1 - without_text(states, dropped).mean()) == pytest.approx(0.1, abs=0.01)
    assert float(states.mean()) == 1.0  # the caller's tensor is as it was


def test_about_four_fifths_of_the_last_scale_are_left_out() -> None:
    generator = Generator().manual_seed(0)
    ratios = torch.tensor([drop_ratio(generator) for _ in range(4000)])
    assert float(ratios.min()) >= 0.5
    assert float(ratios.max()) <= 1.0
    assert float(ratios.mean()) == pytest.approx(0.82, abs=0.01)


def test_kept_tokens_are_in_raster_order_and_at_least_thirty_two() -> None:
    orders = random_orders(3, 256, Generator().manual_seed(0))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(256).expand(3, -1))
    kept = kept_tokens(orders, 1.0)
    assert kept.shape == (3, 32)
    assert bool((kept.diff(dim=1) > 0).all())
    assert kept_tokens(random_orders(3, 16, Generator()), 0.9).shape == (3, 16)


def test_the_residual_is_what_the_sampled_code_leaves(quantizer: MultiScaleQuantizer) -> None:
    model, generator = new_model().requires_grad_(False), Generator().manual_seed(0)
    targets = noisy_targets(quantizer, numbers(2, 32, 4, 4), generator)
    text = model.encode_text(numbers(2, 20, 576), torch.ones(2, 20))
    losses = training_losses(
        model,
        text,
        targets,
        quantizer.codebook_VC,
        choose=lambda logits: sampled_codes(logits, generator),
        draw_noise=lambda rows: model.residual.draw_training(rows, generator),
        kept_BK=torch.tensor([[0, 5], [3, 15]]),
    )
    rest = targets.rest_BNC[1, 15] - quantizer.codebook_VC[losses.sampled_BK[1, 1]]
    torch.testing.assert_close(losses.residual_RC[3], rest)
    assert losses.logits_BMV.shape == (2, 1 + 4 + 9 + 2, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_all_stages_end_in_a_folder_that_draws(sprite_set: SpriteSet, tmp_path: Path) -> None:
    sprite_set.save(tmp_path / "data" / "sprites-128.safetensors")
    paths = [
        part for name in ("data", "runs", "weights") for part in (f"--{name}", str(tmp_path / name))
    ]
    for stage in ("hart-tokenizer", "hart", "publish-hart"):
        assert main([stage, "--profile", "smoke", *paths]) == 0
    assert (tmp_path / "runs" / "smoke" / "hart" / "transformer" / "loss.png").exists()
    pipeline = load_hart(tmp_path / "weights" / "hart-tiny")
    request = GenerationRequest(prompt="a red apple", width=64, height=64)
    draft = pipeline.begin(pipeline.recipe(request))
    while not draft.done:
        (draft,) = pipeline.advance([draft])
    assert draft.finite
    assert pipeline.latent(draft).shape == (32, 4, 4)
