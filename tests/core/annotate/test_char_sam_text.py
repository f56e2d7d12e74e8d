"""Graphemes, writing direction, and the order of a polygon's corners."""

import numpy as np
import pytest
from gesso_core.annotate.char_sam.glyphs import font_set
from gesso_core.annotate.char_sam.graphemes import graphemes, script_of, visual_order
from gesso_core.annotate.char_sam.reading import reading_of
from gesso_core.annotate.char_sam.rectify import rectify
from gesso_core.annotate.char_sam.words import WordAnnotation, check_word, signed_area
from gesso_core.errors import InvalidRequest

SQUARE = ((10.0, 10.0), (110.0, 10.0), (110.0, 40.0), (10.0, 40.0))


def word(polygon, text="OPEN") -> WordAnnotation:
    return WordAnnotation(text=text, polygon=tuple(polygon))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cafe\u0301", ["C", "a", "f", "e\u0301"]),
        ("\U0001f469\u200d\U0001f680!", ["\U0001f469\u200d\U0001f680", "!"]),
        ("\U0001f44d\U0001f3fdok", ["\U0001f44d\U0001f3fd", "o", "k"]),
        (
            "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
            ["\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7"],
        ),
        ("\u1112\u1161\u11ab글", ["\u1112\u1161\u11ab", "글"]),
        ("नि", ["नि"]),
        ("\u200fשל\u200eo", ["\u200fש", "ל\u200e", "o"]),
        ("\ufeffa \u200bb", ["\ufeffa", " ", "\u200bb"]),
        ("", []),
    ],
)
def test_marks_joiners_flags_and_jamo_stay_together(text: str, expected: list[str]) -> None:
    assert graphemes(text) == expected


def test_clusters_agree_with_unicode_on_everyday_text() -> None:
    regex = pytest.importorskip("regex")
    text = "Ärger, naïve, Zoë's 70% – 서울 愚园路 किताब שלום مرحبا \U0001f3f4\u200d\u2620\ufe0f"
    assert graphemes(text) == regex.findall(r"\X", text)


def test_left_to_right_text_keeps_its_order() -> None:
    assert visual_order(list("Gate 7")) == [0, 1, 2, 3, 4, 5]


def test_right_to_left_text_is_turned_round_and_its_numbers_are_not() -> None:
    assert visual_order(list("שלום")) == [3, 2, 1, 0]
    clusters = list("שער 12")
    assert "".join(clusters[i] for i in visual_order(clusters)) == "12 רעש"


def test_marks_that_nobody_sees_change_no_glyph() -> None:
    fonts = font_set()
    for plain, marked in (("ש", "\u200fש"), ("A", "A\u00ad")):
        assert fonts.advance(marked) == fonts.advance(plain)
        pairs = zip(fonts.templates(marked), fonts.templates(plain), strict=True)
        assert all(np.array_equal(one.ink_hw, other.ink_hw) for one, other in pairs)
    with pytest.raises(InvalidRequest, match="transcription is empty"):
        check_word(word(SQUARE, " \u200f\ufeff"), (100, 200))


def test_scripts_are_named() -> None:
    assert (script_of("서"), script_of("é"), script_of("愚")) == ("HANGUL", "LATIN", "CJK")


def test_a_counter_clockwise_polygon_keeps_its_first_corner() -> None:
    reading = reading_of(word((SQUARE[0], *SQUARE[:0:-1])))
    assert reading.top == (SQUARE[0], SQUARE[1])
    assert not reading.moved


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_another_start_corner_of_a_long_word_is_put_right(turn: int) -> None:
    reading = reading_of(word(SQUARE[turn:] + SQUARE[:turn]))
    assert reading.top == (SQUARE[0], SQUARE[1])
    assert reading.bottom == (SQUARE[3], SQUARE[2])
    assert reading.moved


def test_corners_given_crosswise_are_untangled() -> None:
    a, b, c, d = SQUARE
    reading = reading_of(word((a, c, b, d)))
    assert signed_area(reading.top + reading.bottom[::-1]) == 3000


@pytest.mark.parametrize(
    "corners",
    [
        ((10, 10), (100, 10), (200, 10), (100, 60)),
        ((10, 10), (100, 40), (200, 10), (100, 60)),
        ((10, 10), (200, 10), (200, 60), (200, 60)),
        ((10, 10), (200, 35), (200, 35.1), (10, 60)),
    ],
    ids=["three on a line", "dented", "a corner twice", "running to a point"],
)
def test_corners_without_a_perspective_map_are_boxed_in(corners) -> None:
    rectangle = rectify(reading_of(word(corners)))
    assert np.isfinite(rectangle.grid_hw2).all()
    there = rectangle.from_picture(*np.array(corners, float).T)
    height, width = rectangle.size
    assert ((there > -1) & (there < (width + 1, height + 1))).all()


def test_a_tall_word_of_several_characters_is_read_downwards() -> None:
    tall = ((10.0, 10.0), (40.0, 10.0), (40.0, 130.0), (10.0, 130.0))
    reading = reading_of(word(tall))
    assert reading.downward
    assert reading.top == (tall[1], tall[2])


def test_a_single_character_is_never_read_downwards() -> None:
    tall = ((10.0, 10.0), (20.0, 10.0), (20.0, 50.0), (10.0, 50.0))
    assert not reading_of(word(tall, "I")).downward


def test_a_steep_word_whose_first_edge_is_long_was_rotated() -> None:
    steep = ((40.0, 10.0), (40.0, 130.0), (10.0, 130.0), (10.0, 10.0))
    reading = reading_of(word(steep))
    assert not reading.downward
    assert reading.top == (steep[0], steep[1])


def test_a_bent_word_is_split_into_top_and_bottom_whatever_the_start() -> None:
    top = [(0.0, 20.0), (50.0, 0.0), (100.0, 20.0)]
    bottom = [(100.0, 50.0), (50.0, 30.0), (0.0, 50.0)]
    bent = top + bottom
    for start in (0, 2, 3):
        reading = reading_of(word(bent[start:] + bent[:start]))
        assert reading.top == tuple(top), start
        assert reading.bottom == tuple(bottom[::-1]), start
