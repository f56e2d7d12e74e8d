"""Training of VILA-U's vision tower, and what is measured of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.text.states import TextStates
from gesso_core.train.captioned_pictures import CaptionedPictures
from gesso_core.train.captions import draw_records
from gesso_core.train.optimizers import matrix_muon
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.text_cache import encode_captions
from gesso_core.train.tower_quality import (
    codebook_use,
    recognition,
    reconstruction_quality,
    tower_quality,
)
from gesso_core.train.tower_start import start_linear, start_tables
from gesso_core.train.vila_u_tower import (
    ENCODER,
    STATE,
    TOWER,
    TOWER_PROFILES,
    TowerInTraining,
    contrastive_loss,
    encode_pictures,
    load_tower_run,
    train_tower,
)
from small_towers import small_tower
from torch import Generator

SMALL = small_tower(size=32, patch=16, codes=4, entries=32, layers=2, latent=32)


class WordEncoder:
    """One token with eight numbers that depend on the letters."""

    width, max_tokens = 8, 1

    def encode(self, prompts: list[str]) -> TextStates:
        states = torch.zeros(len(prompts), 1, 8)
        for row, prompt in enumerate(prompts):
            for letter in prompt:
                states[row, 0, ord(letter) % 8] += 1
        return TextStates(
            states, torch.ones(len(prompts), 1, dtype=torch.bool), [False] * len(prompts)
        )

    encode_negative = encode


@pytest.fixture
def data(sprite_set: SpriteSet) -> CaptionedPictures:
    records = draw_records(sprite_set.concepts, 100, seed=0)
    states = encode_captions(WordEncoder(), [record.text for record in records])
    return CaptionedPictures(sprite_set, records, states, 32)


def test_pictures_show_what_their_captions_ask_for_and_nothing_held_out(
    data: CaptionedPictures,
) -> None:
    batch = data.draw(200, Generator().manual_seed(0))
    assert batch.pixels_B3SS.shape == (200, 3, 32, 32)
    assert data.shown_NK[batch.sprite_B, batch.color_B].all()
    assert torch.equal(batch.concept_B, data.concept_of_N[batch.sprite_B])
    sprites, colors = data.held_out()
    assert len(sprites) == len(data.concept_of_N)
    assert not data.shown_NK[sprites, colors].any()
    again = data.draw(200, Generator().manual_seed(0))
    assert torch.equal(again.pixels_B3SS, batch.pixels_B3SS)


def test_the_first_features_are_a_linear_code_that_keeps_most_of_a_picture(
    data: CaptionedPictures,
) -> None:
    torch.manual_seed(0)
    tower = VisionTower(SMALL)
    pixels = data.draw(64, Generator().manual_seed(0)).pixels_B3SS
    start_linear(tower, pixels)
    embedding = tower.encoder.embeddings.patch_embedding
    code = embedding(pixels).detach()
    assert float(code.square().mean()) == pytest.approx(1.0, rel=1e-3)
    basis = embedding.weight.detach().flatten(1)
    patches = torch.nn.functional.unfold(pixels, 16, stride=16).transpose(1, 2)
    centered = patches - patches.flatten(0, 1).mean(dim=0)
    back = centered @ basis.T @ torch.linalg.pinv(basis).T
    lost = (back - centered).square().mean() / centered.square().mean()
    assert lost < 0.2


def test_the_first_tables_hold_vectors_of_the_batch(data: CaptionedPictures) -> None:
    torch.manual_seed(0)
    tower = VisionTower(SMALL)
    with torch.no_grad():
        latent = tower.features(data.draw(32, Generator().manual_seed(0)).pixels_B3SS)
        start_tables(tower, latent, Generator().manual_seed(1))
        first = tower.quantizer.tables[0].table_VC[:16]
    assert torch.cdist(first, latent.reshape(-1, 32)).amin(dim=1).max() < 1e-2
    found = tower.quantizer.encode(latent)
    errors = [float((latent - part).square().mean()) for part in found.partial_sums]
    assert errors[-1] < errors[0] < float(latent.square().mean())


@pytest.mark.slow
def test_a_run_freezes_its_encoder_on_the_way_and_ends_with_a_whole_tower(
    data: CaptionedPictures, tmp_path: Path
) -> None:
    profile = replace(TOWER_PROFILES["smoke"], config=SMALL, seconds=1.5)
    with pytest.raises(WeightsError, match="does not exist yet"):
        load_tower_run(tmp_path)
    tower = train_tower(profile, data, tmp_path)
    for name in (ENCODER, TOWER, STATE):
        assert (tmp_path / name).exists()
    pixels = data.compositions(torch.arange(4), torch.arange(4))
    loaded = load_tower_run(tmp_path)
    assert encode_pictures(loaded, pixels).shape == (4, 2, 2, 4)
    (tmp_path / TOWER).unlink()
    early = load_tower_run(tmp_path)
    assert torch.equal(encode_pictures(early, list(pixels)), encode_pictures(loaded, pixels))
    assert tower.decode(tower.encode(pixels).features_BhwC).isfinite().all()
    continued = train_tower(profile, data, tmp_path)
    for key, tensor in tower.state_dict().items():
        assert torch.equal(continued.state_dict()[key], tensor)


def test_a_matching_pair_costs_less_than_a_swapped_one(data: CaptionedPictures) -> None:
    torch.manual_seed(0)
    model = TowerInTraining(SMALL, text_width=8)
    batch = data.draw(2, Generator().manual_seed(3))
    batch = replace(batch, concept_B=torch.tensor([0, 1]))
    text = torch.eye(2, 8) * 3
    vectors = model.text(text).detach()
    with torch.no_grad():
        right = contrastive_loss(model, vectors, batch, text)
        wrong = contrastive_loss(model, vectors.flip(0), batch, text)
        same = replace(batch, concept_B=torch.tensor([0, 0]))
        uncounted = contrastive_loss(model, vectors, same, text)
    assert right < wrong
    assert uncounted < right


def test_quality_is_measured_with_and_without_codes(
    data: CaptionedPictures, sprite_set: SpriteSet
) -> None:
    torch.manual_seed(0)
    tower = VisionTower(SMALL).eval()
    pixels = data.compositions(*data.held_out())
    found = reconstruction_quality(tower, pixels)
    assert found["pictures"] == len(pixels)
    assert 0 < found["psnr_db"] < 30
    told = recognition(tower, data)
    assert all(0 <= told[name] <= 1 for name in told if name != "pictures")
    assert tower_quality(tower, data, sprite_set)["held-out compositions"] == found
    codes = torch.tensor([0, 0, 1, 1]).view(1, 2, 2, 1)
    use = codebook_use(codes, entries=4)
    assert use["used, any depth"] == 0.5
    assert use["perplexity, first depth"] == pytest.approx(2.0)


def test_a_convolution_is_updated_as_the_matrix_that_it_is() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3, bias=False)
    matrix = torch.nn.Parameter(convolution.weight.detach().clone().view(8, -1))
    ours = matrix_muon([convolution.weight], 0.1, weight_decay=0.01)
    plain = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(2):
        gradient = torch.randn(8, 27, generator=Generator().manual_seed(step))
        convolution.weight.grad, matrix.grad = gradient.view(8, 3, 3, 3), gradient
        ours.step()
        plain.step()
    assert torch.equal(convolution.weight.view(8, -1), matrix)
