"""Signs put into pictures: what is known of their pixels, and what cannot be written."""

import numpy as np
import pytest
from gesso_core.annotate.char_sam.backgrounds import background
from gesso_core.annotate.char_sam.sign_layout import lay_out
from gesso_core.annotate.char_sam.signs import check_texts, compose, enlarged
from gesso_core.annotate.char_sam.words import check_word, polygon_mask
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels
from scipy.ndimage import binary_dilation
from torch import Generator

SIZE = (256, 384)


def wall(seed: int = 0) -> Pixels:
    picture = background(Generator().manual_seed(seed), SIZE)
    return (picture * 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_the_truth_is_what_changed_when_the_text_was_written_up_to_its_soft_edge(seed: int) -> None:
    sign = compose(wall(seed), ["OPEN", "24 hours"], seed=seed)
    scene = sign.scene
    truth_HW = scene.values_HW > 0
    difference = np.abs(scene.picture_HW3.astype(int) - sign.empty_HW3).max(-1)
    assert (difference[truth_HW] > 20).all()
    assert not difference[~binary_dilation(truth_HW, iterations=2)].any()
    np.testing.assert_array_equal(scene.truth(0) | scene.truth(1), truth_HW)
    assert not (scene.truth(0) & scene.truth(1)).any()


def test_every_character_has_its_value_its_box_and_its_place_in_its_words_polygon() -> None:
    scene = compose(wall(), ["OPEN", "24 hours"], seed=3).scene
    assert [c.char for c in scene.characters[1]] == list("24hours")  # a space has no pixels
    values = [c.value for word in scene.characters for c in word]
    assert values == list(range(1, 12))
    for number, word in enumerate(scene.words):
        check_word(word, SIZE)
        inside_HW = polygon_mask(word.polygon, SIZE)
        assert not (scene.truth(number) & ~inside_HW).any()
        for character in scene.characters[number]:
            rows, columns = np.nonzero(scene.values_HW == character.value)
            x0, y0, x1, y1 = character.box
            assert (columns.min(), rows.min()) == (x0, y0)
            assert (columns.max() + 1, rows.max() + 1) == (x1, y1)


def test_the_same_seed_gives_the_same_sign_in_whatever_picture_and_another_seed_another() -> None:
    first, again, elsewhere, other = (
        compose(wall(picture), ["OPEN"], seed=seed)
        for picture, seed in ((0, 5), (0, 5), (1, 5), (0, 6))
    )
    np.testing.assert_array_equal(first.scene.picture_HW3, again.scene.picture_HW3)
    np.testing.assert_array_equal(first.scene.values_HW, elsewhere.scene.values_HW)
    assert first.scene.words == elsewhere.scene.words != other.scene.words


@pytest.mark.parametrize("size", [(256, 256), (256, 640), (640, 256)])
def test_a_sign_stands_within_pictures_of_any_shape(size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 128, np.uint8)
    for seed in range(3):
        scene = compose(picture, ["OPEN", "DAY"], seed=seed).scene
        corners = np.array([point for word in scene.words for point in word.polygon])
        assert (corners >= 0).all()
        assert (corners <= size[::-1]).all()


def test_a_text_from_right_to_left_begins_at_the_right() -> None:
    (line,) = lay_out(["פתוח 24"])
    pens = {glyph.char: glyph.pen[0] for glyph in line.glyphs}
    assert [glyph.char for glyph in line.glyphs] == list("פתוח24")
    assert pens["2"] < pens["4"] < pens["ח"] < pens["ת"] < pens["פ"]


@pytest.mark.parametrize(
    ("texts", "field", "sentence"),
    [
        (["OPEN", "京都"], "words.1", r"no font has '京' \(CJK\)"),
        (["no 🍎"], "words.0", "no font has '🍎'"),
        (["\u200b"], "words.0", "no character that can be seen"),
        (
            ["OPEN", "a text of so many letters that nobody could read it"],
            "words.1",
            "shorter text",
        ),
        (["a"] * 8, "words", "fewer words"),
    ],
)
def test_what_cannot_be_written_is_refused_by_its_field(
    texts: list[str], field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        check_texts(texts, SIZE)
    assert caught.value.field == field


def test_a_text_that_is_too_long_for_wide_fonts_is_set_in_a_narrow_one() -> None:
    text = "so many letters as fit"
    narrow = [compose(wall(), [text], seed=seed).scene for seed in range(6)]
    heights = [max(c.box[3] - c.box[1] for c in scene.characters[0]) for scene in narrow]
    assert min(heights) >= 10  # of a font of 20 pixels and more
    with pytest.raises(InvalidRequest, match="cannot be labelled"):
        check_texts([2 * text], SIZE)


def test_a_drawing_is_enlarged_to_cover_the_picture_without_being_stretched() -> None:
    small = np.zeros((64, 64, 3), np.uint8)
    small[24:40, 24:40] = 255
    large = enlarged(small, SIZE)
    assert large.shape == (*SIZE, 3)
    rows, columns = np.nonzero(large[..., 0] > 127)
    assert np.ptp(rows) == np.ptp(columns) == 95
