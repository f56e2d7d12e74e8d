"""Lessons, training and publishing of the small VILA-U, on made-up sprites."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, WeightsError
from gesso_core.evaluate.vila_u import Examples, ExampleSets, answers, draw, understanding
from gesso_core.models.vila_u.splice import IGNORED
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_load import load_vila_u
from gesso_core.train.captions import held_out_color
from gesso_core.train.compose import COLORS
from gesso_core.train.publish_vila_u import publish_vila_u
from gesso_core.train.questions import (
    NO,
    YES,
    Questions,
    Shown,
    describe,
    judge_question,
    unseen_style,
)
from gesso_core.train.run_state import read_counters
from gesso_core.train.sprites import STYLES, SpriteSet
from gesso_core.train.vila_u import STATE, train_language
from gesso_core.train.vila_u_data import Lessons, Splits, encode_views
from gesso_core.train.vila_u_tokenizer import load_tokenizer

SIZE = 16


@pytest.fixture
def lessons(sprite_set: SpriteSet, vila_u: VilaUPipeline, vila_u_tokenizer: Path) -> Lessons:
    codes = encode_views(vila_u.model.tower, sprite_set, size=SIZE, views=4)
    tokenizer = load_tokenizer(vila_u_tokenizer)
    return Lessons(sprite_set, codes, tokenizer, vila_u.model.config, random.Random(1))


def test_nothing_held_out_is_ever_shown(sprite_set: SpriteSet) -> None:
    splits = Splits.of(sprite_set)
    everything = [*splits.seen, *splits.held_out_color, *splits.held_out_style]
    assert len(everything) == len(set(everything)) == 12 * len(COLORS)
    for shown in splits.seen:
        concept = sprite_set.concepts[shown.concept]
        assert shown.color != held_out_color(concept.emoji, STYLES[shown.style])
        assert not unseen_style(concept, shown.style, (0, 1))
    assert all(
        unseen_style(sprite_set.concepts[s.concept], s.style, (0, 1)) for s in splits.held_out_style
    )


def test_every_concept_is_seen_in_some_style(sprite_set: SpriteSet) -> None:
    for concept in sprite_set.concepts:
        assert sum(unseen_style(concept, style, (0, 1)) for style in (0, 1)) <= 1
        assert not unseen_style(concept, 0, (0,))


def test_lessons_show_only_what_may_be_seen(lessons: Lessons) -> None:
    codes, sprite_of = lessons.codes.codes_NKVTD, lessons.splits.sprite_of
    allowed = {
        tuple(codes[sprite_of[s.concept, s.style], s.color, view].flatten().tolist())
        for s in lessons.splits.seen
        for view in range(4)
    }
    rows = lessons.draw(3000)
    pictures = 0
    for row in rows:
        visual = row.codes_LD[row.codes_LD[:, 0] >= 0]
        for picture in visual.view(-1, 4, 3):
            assert tuple(picture.flatten().tolist()) in allowed
            pictures += 1
    assert pictures > 30


def test_only_answers_are_targets(lessons: Lessons) -> None:
    vocabulary = lessons.config.vocabulary
    row = lessons._see()
    visual = row.codes_LD[:, 0] >= 0
    assert row.labels_LD[visual].unique().tolist() == [IGNORED]
    assert row.labels_LD[0, 0] == IGNORED
    drawn = lessons._draw(1.0)
    visual = drawn.codes_LD[:, 0] >= 0
    assert torch.equal(drawn.labels_LD[visual], drawn.codes_LD[visual] + vocabulary)
    said = drawn.labels_LD[~visual, 0]
    assert said[said != IGNORED].tolist()[-3:] == [
        lessons.config.im_start,
        lessons.config.im_end,
        lessons.tokenizer.eos_token_id,
    ]


def test_answers_are_true(sprite_set: SpriteSet) -> None:
    questions = Questions(sprite_set.concepts, (0, 1), random.Random(0))
    shown = Shown(concept=2, style=1, color=4)
    for _ in range(200):
        turns = questions.about(shown, 3) + questions.claims(shown, 3)
        assert [turn.role for turn in turns] == ["user", "assistant"] * 6
        assert [turn.text.startswith("<image>\n") for turn in turns[::6]] == [True, True]
        for asked, said in zip(turns[::2], turns[1::2], strict=True):
            truth = ("bar", "flat", "orange")
            if said.text in (YES, NO):
                words = re.findall(r"\w+", asked.text)
                names = [concept.name for concept in sprite_set.concepts]
                claims = [word for word in words if word in (*names, "3D", "flat", *COLORS)]
                assert claims
                assert (said.text == YES) == all(claim in truth for claim in claims)
            else:
                assert said.text in (*truth, describe(sprite_set.concepts, shown))


def test_a_wrong_claim_is_wrong_in_one_thing_that_it_says(sprite_set: SpriteSet) -> None:
    questions = Questions(sprite_set.concepts, (0, 1), random.Random(0))
    shown = Shown(concept=0, style=0, color=0)
    for _ in range(100):
        asked, said = questions.judgement(shown, true=False)
        assert said == NO
        assert "disc" not in asked or "3D" not in asked or "white" not in asked
        assert questions.judgement(shown, true=True)[1] == YES
    assert judge_question("a red disc. ") == "does this picture show a red disc?"


@pytest.mark.slow
def test_training_learns_and_continues(
    lessons: Lessons, vila_u: VilaUPipeline, tmp_path: Path
) -> None:
    model = copy.deepcopy(vila_u.model).requires_grad_(True)
    model.tower.requires_grad_(False)
    before = copy.deepcopy(model.tower.state_dict())
    train_language(model, lessons, tmp_path, budget_s=2.0, tokens=300)
    first = read_counters(tmp_path / STATE)
    train_language(model, lessons, tmp_path, budget_s=3.0, tokens=300)
    second = read_counters(tmp_path / STATE)
    assert second["step"] > first["step"] > 3
    assert all(torch.equal(before[k], v) for k, v in model.tower.state_dict().items())
    assert not torch.equal(model.llm.lm_head.weight, vila_u.model.llm.lm_head.weight)


@pytest.fixture
def published(vila_u: VilaUPipeline, vila_u_tokenizer: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    publish_vila_u(vila_u.model, vila_u_tokenizer, folder, about={"seed": 5})
    return folder


def test_what_is_published_loads_as_it_was(vila_u: VilaUPipeline, published: Path) -> None:
    loaded = load_vila_u(published)
    assert loaded.model.config == vila_u.model.config
    assert loaded.entry.tasks == ("image-to-text", "text-to-image", "text-to-video")
    ours = vila_u.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, ours[name].half().float(), atol=0, rtol=0)
    picture = Examples(
        pixels_N4SS=torch.zeros(1, 4, SIZE, SIZE, dtype=torch.uint8), shown=(Shown(0, 0, 3),)
    ).pictures()[0]
    assert len(loaded.judge([picture], "a red disc")) == 1


def test_a_foreign_or_damaged_folder_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no folder llm, vision_tower, mm_projector"):
        load_vila_u(tmp_path)
    tokenizer = published / "llm" / "tokenizer.json"
    words = tokenizer.read_text()
    tokenizer.write_text("{")
    with pytest.raises(WeightsError, match="no tokenizer that can be read"):
        load_vila_u(published)
    tokenizer.write_text(words.replace("<im_start>", "<im_begin>"))
    with pytest.raises(WeightsError, match="markers of pictures and videos"):
        load_vila_u(published)
    tokenizer.write_text(words)
    config = published / "vision_tower" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 20', '"vocab_size": 21'))
    with pytest.raises(ConfigError, match="draws from 21 codes"):
        load_vila_u(published)


def test_the_evaluation_counts_right_answers(
    sprite_set: SpriteSet, vila_u: VilaUPipeline, tmp_path: Path
) -> None:
    sets = ExampleSets.of(sprite_set, SIZE, per_set=6)
    sets.save(tmp_path / "examples.safetensors")
    again = ExampleSets.load(tmp_path / "examples.safetensors")
    assert {name: e.shown for name, e in again.sets.items()} == {
        name: e.shown for name, e in sets.sets.items()
    }
    held_out = again.sets["held-out color"]
    measures = understanding(vila_u, again.concepts, held_out, "held-out color")
    by_name = {measure.name: measure.value for measure in measures}
    assert by_name["held-out color: yes or no, most frequent answer"] == 0.5
    assert 0 <= by_name["held-out color: object"] <= 1
    assert len(answers(vila_u, held_out.pictures()[:2], ["what is it?"] * 2)) == 2


def test_pictures_are_drawn_for_the_evaluation(vila_u: VilaUPipeline) -> None:
    pictures = draw(vila_u, ["a red disc", "hello"])
    assert pictures.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(draw(vila_u, ["hello"], seed=1)[0], pictures[1])


def test_the_tokenizer_writes_any_text(vila_u_tokenizer: Path, vila_u: VilaUPipeline) -> None:
    tokenizer = load_tokenizer(vila_u_tokenizer)
    for text in ("a red disc", "Grüße, 猫!\n\t", "🎨"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    config = vila_u.model.config
    marks = ["<im_start>", "<im_end>", "<vi_start>", "<vi_end>"]
    found = tokenizer.convert_tokens_to_ids(marks)
    assert found == [config.im_start, config.im_end, config.vi_start, config.vi_end]
    assert len(tokenizer) == config.vocabulary
