"""Caches and batches of the denoiser's training."""

from pathlib import Path

import pytest
import torch
from gesso_core.models.sana import SANA_CONFIGS, Sana, initialize_weights
from gesso_core.text.states import TextStates
from gesso_core.train.captions import ANY_STYLE, draw_records, held_out_color
from gesso_core.train.compose import COLORS
from gesso_core.train.denoiser import Batch, CaptionedLatents, flow_loss
from gesso_core.train.latents import LatentViews, shown_compositions
from gesso_core.train.sprites import STYLES, SpriteSet
from gesso_core.train.text_cache import CaptionStates, encode_captions
from torch import Generator


class LengthEncoder:
    """Token i of a text of n characters has the state (n, i); one token per 5 characters."""

    width, max_tokens = 2, 20

    def encode(self, prompts: list[str]) -> TextStates:
        states, mask = (
            torch.zeros(len(prompts), 20, 2),
            torch.zeros(len(prompts), 20, dtype=torch.bool),
        )
        for row, prompt in enumerate(prompts):
            count = min(20, 1 + len(prompt) // 5)
            states[row, :count, 0], states[row, :count, 1] = (
                len(prompt),
                torch.arange(count).float(),
            )
            mask[row, :count] = True
        return TextStates(states, mask, [False] * len(prompts))

    encode_negative = encode


def test_cached_states_are_those_of_each_caption() -> None:
    texts = ["a longer caption of things", "x", "some words"]
    states = encode_captions(LengthEncoder(), texts)
    batch, mask = states.batch(torch.tensor([1, 0, states.empty]))
    assert batch[:, 0, 0].tolist() == [1, len(texts[0]), 0]
    assert mask.sum(dim=1).tolist() == [1, 1 + len(texts[0]) // 5, 1]
    assert (batch[~mask] == 0).all()


def test_cached_states_survive_being_written(tmp_path: Path) -> None:
    states = encode_captions(LengthEncoder(), ["one", "another one"])
    states.save(tmp_path / "captions.safetensors")
    loaded = CaptionStates.load(tmp_path / "captions.safetensors")
    assert torch.equal(loaded.tokens_TS, states.tokens_TS)
    assert len(loaded) == 3


def marked_latents(sprites: SpriteSet) -> LatentViews:
    """Latents that say which sprite and color they are; held-out compositions are NaN."""
    shown = shown_compositions(sprites)
    latents = torch.full((*shown.shape, 1, 2, 1, 1), float("nan"))
    for n, k in shown.nonzero().tolist():
        latents[n, k, 0, :, 0, 0] = torch.tensor([float(n), float(k)])
    return LatentViews(latents_NKVChw=latents.half(), std=1.0)


@pytest.fixture
def data(sprite_set: SpriteSet) -> CaptionedLatents:
    records = draw_records(sprite_set.concepts, 300, seed=0)
    states = encode_captions(LengthEncoder(), [record.text for record in records])
    return CaptionedLatents(sprite_set, marked_latents(sprite_set), records, states)


def test_batches_never_show_a_held_out_composition(data: CaptionedLatents) -> None:
    batch = data.draw(2000, Generator().manual_seed(0))
    assert batch.latent_BChw.isfinite().all()


def test_captions_of_a_style_without_sprites_are_left_out(
    data: CaptionedLatents, sprite_set: SpriteSet
) -> None:
    assert data.records_R4[:, 2].max() == 1
    assert len(STYLES) == 3
    assert sprite_set.style_of_N.max() == 1


def test_exact_captions_name_their_concept_and_a_style(data: CaptionedLatents) -> None:
    assert (data.records_R4[data.exact_E, 2] != ANY_STYLE).all()


def test_every_color_but_the_held_out_one_is_shown(sprite_set: SpriteSet) -> None:
    shown = shown_compositions(sprite_set)
    assert (shown.sum(dim=1) == len(COLORS) - 1).all()
    first = sprite_set.concepts[0].emoji
    assert not shown[0, held_out_color(first, STYLES[0])]


def test_the_loss_of_an_untrained_model_is_that_of_noise_and_data() -> None:
    torch.manual_seed(0)
    model = Sana(SANA_CONFIGS["sana-tiny"])
    initialize_weights(model, Generator().manual_seed(0))
    torch.nn.init.zeros_(model.head.linear.weight)
    batch = _random_batch()
    assert flow_loss(model, batch, Generator().manual_seed(1)).item() == pytest.approx(2.0, abs=0.1)


def _random_batch() -> Batch:
    return Batch(
        latent_BChw=torch.randn(16, 32, 4, 4),
        text_BLS=torch.randn(16, 5, 576),
        mask_BL=torch.ones(16, 5, dtype=torch.bool),
    )
