"""From a word to character boxes: laying flat, ink, cuts, alignment."""

import math
import time

import numpy as np
import pytest
from gesso_core.annotate.char_sam.ctc import align
from gesso_core.annotate.char_sam.cuts import cut_word
from gesso_core.annotate.char_sam.glyphs import font_set
from gesso_core.annotate.char_sam.ink import colour_ink, joint_ink, text_colour_ink, to_lab
from gesso_core.annotate.char_sam.reading import reading_of
from gesso_core.annotate.char_sam.rectify import rectify
from gesso_core.annotate.char_sam.refine_boxes import even_boxes, refine_boxes
from gesso_core.annotate.char_sam.words import WordAnnotation, polygon_mask
from gesso_core.errors import InvalidRequest


def flat(polygon, text="ab"):
    return rectify(reading_of(WordAnnotation(text=text, polygon=polygon)))


TILTED = ((20.0, 30.0), (118.0, 12.0), (124.0, 44.0), (27.0, 61.0))
BENT = (
    *((100 + 80 * math.cos(a), 120 + 80 * math.sin(a)) for a in np.linspace(-2.6, -0.5, 9)),
    *((100 + 50 * math.cos(a), 120 + 50 * math.sin(a)) for a in np.linspace(-0.5, -2.6, 9)),
)


def test_the_corners_of_a_quadrilateral_become_those_of_the_rectangle() -> None:
    rectangle = flat(TILTED)
    margin, (height, width) = rectangle.margin, rectangle.size
    u = np.array([margin, width - margin, width - margin, margin], float)
    v = np.array([margin, margin, height - margin, height - margin], float)
    assert np.allclose(rectangle.to_picture(u, v), TILTED)
    assert height - 2 * margin >= 48


@pytest.mark.parametrize("polygon", [TILTED, BENT])
def test_points_go_flat_and_come_back(polygon) -> None:
    rectangle = flat(polygon)
    rng = np.random.default_rng(0)
    u = rng.uniform(rectangle.margin, rectangle.size[1] - rectangle.margin, 50)
    v = rng.uniform(rectangle.margin, rectangle.size[0] - rectangle.margin, 50)
    picture = rectangle.to_picture(u, v)
    back = rectangle.from_picture(picture[:, 0], picture[:, 1])
    assert np.abs(back - np.stack([u, v], -1)).max() < 1.0


@pytest.mark.parametrize("polygon", [TILTED, BENT])
def test_a_mask_goes_flat_and_comes_back(polygon) -> None:
    rectangle, size = flat(polygon), (140, 200)
    inside = polygon_mask(polygon, size)
    back = rectangle.paint(rectangle.sample_mask(inside), size)
    wrong = np.count_nonzero(back ^ inside) / np.count_nonzero(inside)
    assert wrong < 0.05


def test_text_written_downwards_lies_on_its_left_side() -> None:
    tall = ((10.0, 10.0), (40.0, 10.0), (40.0, 130.0), (10.0, 130.0))
    rectangle = flat(tall)
    assert rectangle.downward
    assert rectangle.size[1] > rectangle.size[0]
    # The end of the word is at the bottom, the upper side of each letter on the left.
    middle = rectangle.size[0] / 2
    end = rectangle.to_picture(np.array([rectangle.size[1] - 1.0]), np.array([middle]))[0]
    assert end[1] > 100


def words_of_bars(text: str = "IIII"):
    """Dark bars on a light wall with a darker panel around, and where each bar is."""
    picture = np.full((60, 140, 3), 200, np.uint8)
    picture[5:55, 5:135] = 120
    boxes = [(20 + 28 * n, 15, 32 + 28 * n, 45) for n in range(len(text))]
    for x0, y0, x1, y1 in boxes:
        picture[y0:y1, x0:x1] = (10, 10, 60)
    return picture, boxes


def test_ink_by_colour_is_what_differs_from_the_ring() -> None:
    picture, boxes = words_of_bars()
    inside = np.zeros((60, 140), bool)
    inside[10:50, 14:122] = True
    ink = colour_ink(to_lab(picture), inside, height=40)
    wanted = np.zeros_like(inside)
    for x0, y0, x1, y1 in boxes:
        wanted[y0:y1, x0:x1] = True
    assert (ink.mask_HW == wanted).all()


def test_one_colour_everywhere_is_no_ink() -> None:
    inside = np.ones((20, 20), bool)
    assert not colour_ink(
        to_lab(np.full((20, 20, 3), 90, np.uint8)), inside, height=20
    ).mask_HW.any()


def test_ink_that_the_segmenter_denies_altogether_is_kept() -> None:
    colour, nothing = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    assert joint_ink(colour, nothing).all()
    half = nothing.copy()
    half[:2] = True
    assert (joint_ink(colour, half) == half).all()


def test_the_colour_of_the_text_separates_it_from_other_things() -> None:
    picture = np.full((20, 60, 3), 255, np.uint8)
    picture[5:15, 5:25] = (200, 30, 30)
    picture[5:15, 40:50] = (20, 20, 160)
    inside = np.ones((20, 60), bool)
    ink = (picture != 255).any(-1)
    seed = ink & (np.arange(60) < 25)[None]
    found = text_colour_ink(to_lab(picture), inside, ink, seed)
    assert found[:, :25].sum() == 200
    assert not found[:, 30:].any()


def test_cuts_go_through_the_gaps() -> None:
    cost = np.ones(60)
    for gap in (10, 33, 45):
        cost[gap] = 0.0
    assert cut_word(cost, [10, 20, 15, 15]) == [0, 10, 33, 45, 60]


def test_cuts_are_the_cheapest_there_are() -> None:
    rng = np.random.default_rng(3)
    cost, expected = rng.random(14), np.array([1.0, 2.0, 1.0])
    scaled = expected * 14 / expected.sum()

    def price(borders) -> float:
        widths = np.diff(borders)
        if not ((widths >= 0.25 * scaled) & (widths <= 2.6 * scaled)).all():
            return math.inf
        return float(0.3 * (np.log(widths / scaled) ** 2).sum() + cost[list(borders[1:-1])].sum())

    best = min(price((0, a, b, 14)) for a in range(1, 13) for b in range(a + 1, 14))
    assert price(cut_word(cost, expected.tolist())) == pytest.approx(best)


def test_a_long_text_of_uneven_letters_is_cut_in_time() -> None:
    rng = np.random.default_rng(0)
    expected = rng.choice([0.1, 1.0], 1000)  # half of them under a column wide
    begun = time.process_time()
    borders = cut_word(rng.random(1500), expected.tolist())
    assert time.process_time() - begun < 2
    assert (borders[0], borders[-1], len(borders)) == (0, 1500, 1001)
    widths = np.diff(borders)
    assert widths.min() >= 1
    assert widths[expected == 1.0].mean() > widths[expected == 0.1].mean() + 0.3


def test_one_character_has_no_cut() -> None:
    assert cut_word(np.ones(9), [1.0]) == [0, 9]


def test_a_vote_pulls_a_cut_where_ink_says_nothing() -> None:
    pull = np.zeros((3, 40))
    pull[1] = np.abs(np.arange(40) - 28) / 10
    assert cut_word(np.zeros(40), [1, 1]) == [0, 20, 40]
    assert cut_word(np.zeros(40), [1, 1], pull)[1] > 24


def segments_of(text: str, polygon, picture):
    word = WordAnnotation(text=text, polygon=polygon)
    rectangle = rectify(reading_of(word))
    inside = polygon_mask(polygon, picture.shape[:2])
    ink = colour_ink(to_lab(picture), inside, height=40).mask_HW
    clusters = list(text)
    return refine_boxes(rectangle, rectangle.sample_mask(ink), clusters, font_set())


def test_every_bar_gets_its_box() -> None:
    picture, boxes = words_of_bars()
    polygon = ((14.0, 10.0), (122.0, 10.0), (122.0, 50.0), (14.0, 50.0))
    for segment, wanted in zip(segments_of("IIII", polygon, picture), boxes, strict=True):
        assert np.abs(np.array(segment.box) - wanted).max() <= 1.0


def test_right_to_left_characters_keep_their_logical_index() -> None:
    picture, boxes = words_of_bars()
    polygon = ((14.0, 10.0), (122.0, 10.0), (122.0, 50.0), (14.0, 50.0))
    first = next(s for s in segments_of("וןון", polygon, picture) if s.index == 0)
    assert abs(first.box[0] - boxes[3][0]) <= 1.0


def test_a_space_takes_width_but_gets_no_box() -> None:
    picture, _ = words_of_bars("III")
    picture[15:45, 48:60] = 120
    polygon = ((14.0, 10.0), (94.0, 10.0), (94.0, 50.0), (14.0, 50.0))
    found = segments_of("I I", polygon, picture)
    assert [segment.index for segment in found] == [0, 2]


def test_even_boxes_follow_the_widths_of_the_letters() -> None:
    polygon = ((0.0, 0.0), (100.0, 0.0), (100.0, 30.0), (0.0, 30.0))
    wide, narrow = even_boxes(flat(polygon, "Wi"), ["W", "i"], font_set())
    assert wide.box[2] - wide.box[0] > 2 * (narrow.box[2] - narrow.box[0])


def test_repeated_labels_need_a_frame_between_them() -> None:
    log_probs = np.log(np.full((2, 2), 0.5))
    with pytest.raises(InvalidRequest, match="frames"):
        align(log_probs, [1, 1])
    assert align(np.log(np.full((3, 2), 0.5)), [1, 1]).path_T.tolist() == [1, 0, 1]
