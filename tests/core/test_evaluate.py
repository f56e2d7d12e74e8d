"""Concept retrieval, backgrounds, prompts and gates."""

from pathlib import Path

import pytest
import torch
from gesso_core.evaluate import prompts
from gesso_core.evaluate.everyday import everyday_answers
from gesso_core.evaluate.prompts import EvaluationPrompt
from gesso_core.evaluate.references import References, features, load_references, save_references
from gesso_core.evaluate.retrieval import background_colors, score
from gesso_core.evaluate.run import (
    AUTOENCODER_GATES,
    Measure,
    evaluate_autoencoder,
    stored_gates,
    table,
    write_gates,
)
from gesso_core.evaluate.sheet import contact_sheet
from gesso_core.evaluate.shipped import EVALUATIONS
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.train.captions import ANY_STYLE, held_out_color
from gesso_core.train.compose import composite, palette_colors, shrink, sprites_to_float
from gesso_core.train.concepts import everyday_names
from gesso_core.train.sprites import STYLES, SpriteSet


@pytest.fixture
def references(sprite_set: SpriteSet, tmp_path: Path) -> References:
    save_references(sprite_set, tmp_path / "references.safetensors")
    return load_references(tmp_path / "references.safetensors")


def pictures_of(sprites: SpriteSet, color: int) -> torch.Tensor:
    colors = palette_colors(torch.full((len(sprites.concept_of_N),), color))
    return shrink(composite(sprites_to_float(sprites.pixels_NHW4), colors), 64)


def exact_prompts(sprites: SpriteSet, color: int) -> list[EvaluationPrompt]:
    pairs = zip(sprites.concept_of_N.tolist(), sprites.style_of_N.tolist(), strict=True)
    return [
        EvaluationPrompt(text="", concepts=frozenset({c}), style=s, color=color) for c, s in pairs
    ]


def test_pooled_references_equal_pooled_pictures(
    sprite_set: SpriteSet, references: References
) -> None:
    torch.testing.assert_close(
        features(pictures_of(sprite_set, 8)), references.on_color(8), atol=0.02, rtol=0
    )


def test_the_sprites_themselves_score_full_marks(
    sprite_set: SpriteSet, references: References
) -> None:
    scores = score(exact_prompts(sprite_set, 2), pictures_of(sprite_set, 2), references)
    assert (scores.top1, scores.top5, scores.styled, scores.background) == (1, 1, 1, 1)


def test_shuffled_pictures_score_badly(sprite_set: SpriteSet, references: References) -> None:
    pictures = pictures_of(sprite_set, 2).roll(4, dims=0)
    scores = score(exact_prompts(sprite_set, 2), pictures, references)
    assert scores.top1 == 0
    assert scores.background == 1


def test_the_background_is_read_from_the_border() -> None:
    pictures = palette_colors(torch.arange(12))[:, :, None, None].expand(12, 3, 64, 64) * 2 - 1
    assert background_colors(pictures).tolist() == list(range(12))


def test_held_in_and_held_out_prompts_never_overlap() -> None:
    references = load_references(resolve("sana-tiny") / "references.safetensors")
    for prompt in prompts.held_in(references):
        (index,) = prompt.concepts
        emoji = references.concepts[index].emoji
        assert prompt.color != held_out_color(emoji, STYLES[prompt.style])
    for prompt in prompts.held_out(references):
        (index,) = prompt.concepts
        emoji = references.concepts[index].emoji
        assert prompt.color == held_out_color(emoji, STYLES[prompt.style])


def test_everyday_words_are_answered_by_trained_concepts_that_carry_them() -> None:
    references = load_references(resolve("sana-tiny") / "references.safetensors")
    words = {concept.name: (concept.name, *concept.keywords) for concept in references.concepts}
    for word, names in everyday_answers().items():
        assert set(names) <= everyday_names(), word
        assert any(word in words[name] for name in names), word
    assert all(prompt.style == ANY_STYLE for prompt in prompts.everyday(references))


def test_a_value_below_its_gate_fails() -> None:
    assert not Measure(name="x", value=0.5, at_least=0.6).passed
    assert Measure(name="x", value=0.6, at_least=0.6).passed
    assert Measure(name="x", value=0.0).passed
    assert "FAILED" in table([Measure(name="x", value=0.5, at_least=0.6)])


def test_gates_survive_being_written(tmp_path: Path) -> None:
    measures = [Measure(name="a", value=0.5, at_least=0.4), Measure(name="b", value=0.1)]
    write_gates(measures, tmp_path)
    assert stored_gates(tmp_path) == {"a": 0.4}


def test_the_shipped_autoencoder_passes_its_gates() -> None:
    folder = resolve("dcae-tiny")
    measures = evaluate_autoencoder(load_dc_ae(folder), folder)
    assert stored_gates(folder) == AUTOENCODER_GATES
    assert [m.name for m in measures if not m.passed] == []


def test_the_contact_sheet_has_a_captioned_cell_per_picture() -> None:
    sheet = contact_sheet(torch.zeros(9, 3, 64, 64), ["a rather long caption of many words"] * 9)
    assert sheet.width == 8 * 132
    assert sheet.height > 2 * 128
    assert sheet.getpixel((60, 60)) == (128, 128, 128)
    assert sheet.getcolors(maxcolors=100_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_shipped_models_pass_their_gates(name: str) -> None:
    measures = EVALUATIONS[name](None)
    gates = {m.name: m.at_least for m in measures if m.at_least is not None}
    assert stored_gates(resolve(name)) == gates
    assert [f"{m.name} {m.value:.3f} < {m.at_least}" for m in measures if not m.passed] == []
