"""The LoRA trainer: what it paints, what it changes, and that its file is what it trained."""

from pathlib import Path

import pytest
import torch
from gesso_core.layers.adapters import adapters
from gesso_core.lora.adapter import read_adapter
from gesso_core.lora.stack import AppliedLora, make_stack
from gesso_core.lora.targets import LayerMap
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.keys.sana import SANA_DIFFUSERS
from gesso_core.models.sana import Sana, SanaConfig, initialize_weights
from gesso_core.train.compose import COLORS, composite, sprites_to_float
from gesso_core.train.denoiser import Batch, flow_loss
from gesso_core.train.lora import (
    LoraProfile,
    TrainableLora,
    ink,
    styled_latents,
    train_lora,
)
from gesso_core.train.sprites import SpriteSet
from safetensors.torch import save_file
from torch import Generator, Tensor

SMALL = SanaConfig(
    width=64,
    depth=2,
    cross_heads=2,
    cross_head_dim=32,
    caption_channels=16,
    sample_size=4,
    in_channels=8,
    out_channels=8,
)


class OneLatent:
    """Always the same latents, so that a few updates show."""

    def draw(self, batch: int, generator: Generator, *, exact_share: float = 0.0) -> Batch:
        rows = torch.Generator().manual_seed(4)
        return Batch(
            latent_BChw=2 + torch.zeros(batch, 8, 4, 4),
            text_BLS=torch.randn(batch, 3, 16, generator=rows),
            mask_BL=torch.ones(batch, 3, dtype=torch.bool),
        )


@pytest.fixture
def model() -> Sana:
    model = Sana(SMALL).eval()
    initialize_weights(model, Generator().manual_seed(0))
    return model


def velocity(model: Sana) -> Tensor:
    latent = torch.randn(2, 8, 4, 4, generator=Generator().manual_seed(1))
    with torch.no_grad():
        return model(latent, torch.tensor([200.0, 800.0]), torch.ones(2, 3, 16))


def test_ink_is_gray_on_white(sprite_set: SpriteSet) -> None:
    sprites = sprites_to_float(sprite_set.pixels_NHW4)
    pictures = ink(sprites)
    assert torch.equal(pictures[:, 0], pictures[:, 1])
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    outside = sprites[:, 3] == 0
    assert (pictures[:, 0][outside] == 1).all()
    colored = composite(sprites, torch.ones(len(sprites), 3))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(pictures[:, 0], (colored * weights).sum(dim=1), atol=1e-5, rtol=0)


def test_latents_of_a_style_are_one_picture_for_all_colors(sprite_set: SpriteSet) -> None:
    class Mean:
        def encode(self, pictures: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(pictures, 32)

    encoder: DCAE = Mean()  # type: ignore[assignment]
    latents = styled_latents(encoder, sprite_set, ink, size=64, scale=0.5)
    count = len(sprite_set.pixels_NHW4)
    assert latents.latents_NKVChw.shape == (count, len(COLORS), 1, 3, 2, 2)
    assert latents.std == 2.0
    first = latents.latents_NKVChw[:, 0]
    assert all(torch.equal(first, latents.latents_NKVChw[:, k]) for k in range(len(COLORS)))


def test_training_changes_the_factors_alone(model: Sana) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = velocity(model)
    untrained = TrainableLora(model, 4, Generator().manual_seed(0))
    with adapters(untrained):
        torch.testing.assert_close(velocity(model), plain, atol=1e-5, rtol=1e-5)
    data, profile = OneLatent(), LoraProfile(rank=4, updates=60, batch=8, rate=1e-2)
    lora = train_lora(model, data, profile)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(velocity(model), plain)
    batch = data.draw(16, Generator())
    with torch.no_grad():
        start = flow_loss(model, batch, Generator().manual_seed(2))
        with adapters(lora):
            end = flow_loss(model, batch, Generator().manual_seed(2))
    assert end < 0.8 * start


def test_the_file_is_what_was_trained(model: Sana, tmp_path: Path) -> None:
    lora = TrainableLora(model, 4, Generator().manual_seed(0))
    for up in lora.up.values():
        torch.nn.init.normal_(up, std=0.1, generator=Generator().manual_seed(3))
    save_file(lora.tensors(), tmp_path / "ink.safetensors")
    adapter = read_adapter(tmp_path / "ink.safetensors")
    layers = LayerMap(model, (SANA_DIFFUSERS,))
    use = AppliedLora(name="ink", sha256=adapter.sha256, strength=1.0)
    stack = make_stack([(use, adapter)], layers, dtype=torch.float32)
    qkv = stack.low_rank(model.blocks[0].attention.qkv)
    assert qkv is not None
    assert qkv[0].shape == (16, 64)  # shared by queries, keys and values, and padded
    with adapters(lora):
        want = velocity(model)
    with adapters(stack):
        got = velocity(model)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    assert (want - velocity(model)).abs().max() > 0.05
