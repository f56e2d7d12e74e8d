"""Concepts, splits and captions of the training data."""

import random

import pytest
from gesso_core.train.captions import (
    ANY_STYLE,
    WHITE,
    draw_record,
    draw_records,
    filler_phrases,
    held_out_color,
    with_article,
)
from gesso_core.train.concepts import Concept, everyday_names, read_concepts
from gesso_core.train.packages import locked_packages
from gesso_core.train.sprites import STYLES

CAR = {"tts": ["automobile"], "default": ["automobile", "car", "driving", "vehicle", "auto"]}
TABLE = {
    "🚗": {"group": "Travel & Places"},
    "🚙": {"group": "Travel & Places"},
    "🇫🇷": {"group": "Flags"},
    "👋🏽": {"group": "People & Body"},
    "❓": {"group": "Symbols"},
}
ANNOTATIONS = {
    "🚗": CAR,
    "🚙": {"tts": ["sport utility vehicle"], "default": ["car", "vehicle", "4x4", "jeep"]},
    "🇫🇷": {"tts": ["flag: France"], "default": ["flag"]},
    "👋🏽": {"tts": ["waving hand"], "default": ["wave"]},
}


def concepts(protected: frozenset[str] = frozenset()) -> list[Concept]:
    return read_concepts(TABLE, ANNOTATIONS, protected)


def test_flags_skin_tones_and_unnamed_emoji_are_left_out() -> None:
    assert [concept.name for concept in concepts()] == ["automobile", "sport utility vehicle"]


def test_a_word_of_two_concepts_is_never_reserved() -> None:
    assert all(concept.reserved not in ("car", "vehicle") for concept in concepts())


def test_a_protected_word_is_never_reserved() -> None:
    everything = frozenset(word for label in ANNOTATIONS.values() for word in label["default"])
    assert all(concept.reserved is None for concept in concepts(everything))


def test_a_reserved_word_is_not_among_the_trained_ones() -> None:
    assert all(concept.reserved not in concept.keywords for concept in concepts())


def test_the_everyday_list_has_hundreds_of_names_without_clock_faces() -> None:
    names = everyday_names()
    assert len(names) >= 338
    assert not [name for name in names if "o’clock" in name or "thirty" in name]


def test_the_lock_names_a_hash_and_a_licence_for_every_package() -> None:
    for package in locked_packages().values():
        assert len(package.sha256) == 64
        assert package.licence


@pytest.mark.parametrize("style", STYLES)
def test_the_held_out_color_is_never_white(style: str) -> None:
    assert all(held_out_color(emoji, style) != WHITE for emoji in TABLE)


def test_captions_never_show_a_held_out_composition() -> None:
    known = concepts()
    for record in draw_records(known, 2000, seed=1):
        if record.style != ANY_STYLE:
            emoji = known[record.concept].emoji
            assert record.color != held_out_color(emoji, STYLES[record.style])


def test_captions_say_what_their_picture_shows() -> None:
    known, rng = concepts(), random.Random(0)
    for _ in range(500):
        record = draw_record(known, 0, rng)
        words = [known[0].name, *known[0].keywords]
        text = record.text.lower()
        assert any(word in text for word in words)
        assert record.style == ANY_STYLE or STYLES[record.style].lower() in text


def test_captions_repeat_for_the_same_seed() -> None:
    assert draw_records(concepts(), 50, seed=3) == draw_records(concepts(), 50, seed=3)


@pytest.mark.parametrize(("word", "expected"), [("apple", "an apple"), ("car", "a car")])
def test_articles_follow_the_first_letter(word: str, expected: str) -> None:
    assert with_article(word) == expected


def test_filler_phrases_hold_no_thing() -> None:
    phrases = filler_phrases()
    assert not [phrase for phrase in phrases if "{" in phrase]
    assert any("background" in phrase for phrase in phrases)
