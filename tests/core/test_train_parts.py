"""Compositing, schedules, the linear start and saved states of training."""

from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError
from gesso_core.metrics import psnr
from gesso_core.models.dc_ae import DCAE, DCAEConfig, Stage
from gesso_core.train.compose import augment, composite, palette_colors, shrink
from gesso_core.train.linear_start import start_linear
from gesso_core.train.optimizers import descend, muon_and_adamw
from gesso_core.train.profiles import CPU
from gesso_core.train.run_state import RunState, load_averaged, read_counters
from gesso_core.train.schedule import Clock, Ema, learning_rate
from torch import nn


def test_a_transparent_sprite_leaves_the_background() -> None:
    color = palette_colors(torch.tensor([8]))
    picture = composite(torch.zeros(1, 4, 8, 8), color)
    assert torch.allclose((picture[0, :, 0, 0] + 1) / 2, color[0])


def test_shrinking_and_compositing_commute() -> None:
    alpha = torch.rand(2, 1, 16, 16)
    sprite = torch.cat([torch.rand(2, 3, 16, 16) * alpha, alpha], dim=1)
    color = palette_colors(torch.tensor([3, 5]))
    first = shrink(composite(sprite, color), 4)
    torch.testing.assert_close(first, composite(shrink(sprite, 4), color))


def test_untouched_views_are_the_sprite_itself() -> None:
    sprite = torch.rand(3, 4, 16, 16)
    views = augment(sprite, torch.Generator().manual_seed(0), untouched=1.0)
    torch.testing.assert_close(views, sprite, atol=1e-5, rtol=0)


def test_augmentation_keeps_premultiplied_color_below_alpha() -> None:
    alpha = torch.rand(4, 1, 16, 16)
    sprite = torch.cat([torch.rand(4, 3, 16, 16) * alpha, alpha], dim=1)
    views = augment(sprite, torch.Generator().manual_seed(1), untouched=0.0)
    assert (views[:, :3] <= views[:, 3:] + 1e-5).all()


def test_the_learning_rate_warms_up_holds_and_ends_at_its_floor() -> None:
    options = {"peak": 1.0, "floor": 0.05, "hold": 0.6, "warm_up": 10}
    assert learning_rate(0.0, 0, **options) == pytest.approx(0.1)
    assert learning_rate(0.5, 100, **options) == pytest.approx(1.0)
    assert learning_rate(1.0, 100, **options) == pytest.approx(0.05)


def test_the_average_starts_with_a_short_horizon() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.999)
    nn.init.ones_(model.weight)
    for _ in range(30):
        ema.update(model)
    assert ema.shadow["weight"].item() > 0.9


def test_sprites_must_be_a_multiple_of_the_picture() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        CPU.__class__(**{**vars(CPU), "sprite_size": 100})


def smooth_pictures(count: int) -> torch.Tensor:
    coarse = torch.rand((count, 3, 4, 4), generator=torch.Generator().manual_seed(2)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(-1, 1)


def test_the_linear_start_already_reconstructs_smooth_pictures() -> None:
    torch.manual_seed(0)
    stages = tuple(Stage(width=w, depth=int(w > 24)) for w in (24, 32, 64, 64, 64))
    config = DCAEConfig(latent_channels=32, encoder=stages, decoder=stages)
    model, pictures = DCAE(config), smooth_pictures(48)
    with torch.no_grad():
        untrained = psnr(model(pictures), pictures).mean()
        start_linear(model, pictures)
        started = psnr(model(pictures), pictures).mean()
    assert started > 20 > untrained


def new_state(seed: int) -> RunState:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    return RunState(model, (optimizer,), Ema(model, 0.9), generator, Clock(100.0))


def advance(state: RunState) -> None:
    x = torch.randn((4, 3), generator=state.generator)
    state.update(state.model(x).square().mean(), samples=4)


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    original = new_state(1)
    advance(original)
    original.losses.append((1, 0.5))
    original.save(tmp_path / "state.safetensors")
    resumed = new_state(2)
    assert resumed.resume(tmp_path / "state.safetensors")
    for state in (original, resumed):
        advance(state)
    for ours, theirs in zip(original.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(original.ema.shadow["weight"], resumed.ema.shadow["weight"])
    assert (resumed.step, resumed.samples, resumed.losses) == (2, 8, [(1, 0.5)])


def test_a_steep_loss_moves_a_parameter_no_further_than_a_gentle_one() -> None:
    moved = []
    for steepness in (10.0, 1e6):
        layer = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(layer.weight)
        loss = descend(
            layer.weight.sum() * steepness, layer, [torch.optim.SGD([layer.weight], 0.1)]
        )
        assert loss == 0
        moved.append(layer.weight.norm().item())
    assert moved == pytest.approx([0.1, 0.1])


def test_every_parameter_belongs_to_one_optimizer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2))
    weights = [model[0].weight, model[1].weight]
    muon, adamw = muon_and_adamw(model, weights, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    muon.step()
    adamw.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert sum(len(group["params"]) for group in muon.param_groups) == 2
    assert sum(len(group["params"]) for group in adamw.param_groups) == 4


def test_the_averaged_model_can_be_read_from_a_saved_run(tmp_path: Path) -> None:
    state, path = new_state(1), tmp_path / "state.safetensors"
    advance(state)
    state.save(path)
    model = nn.Linear(3, 2)
    load_averaged(model, path)
    assert torch.equal(model.weight, state.ema.shadow["weight"])
    assert read_counters(path)["step"] == 1


def test_nothing_is_resumed_where_nothing_was_saved(tmp_path: Path) -> None:
    assert not new_state(1).resume(tmp_path / "state.safetensors")
