"""The whole method: on a segmenter that only knows colours, and, where it is fetched, on a SAM."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.char_sam import shrinking
from gesso_core.annotate.char_sam.evaluate import as_json, gather, main, report, scene_checks
from gesso_core.annotate.char_sam.glyphs import SHIPPED, font_set
from gesso_core.annotate.char_sam.measure import CHARACTER, COLOUR, GLYPH, METHODS, WORD, measure
from gesso_core.annotate.char_sam.overlay import overlay
from gesso_core.annotate.char_sam.pipeline import CharSam, CharSamOptions
from gesso_core.annotate.char_sam.scenes import load_photographs
from gesso_core.annotate.char_sam.shrinking import shrunk
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.char_sam.words import WordAnnotation, summarize
from gesso_core.annotate.masks import mask_iou
from gesso_core.annotate.segmenter.contract import Embedding, Masks, Prompt, embedding_key
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.errors import InvalidRequest, WeightsError
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

DATA = Path(__file__).parents[4] / "shared" / "data" / "annotation"
FONT = ImageFont.truetype(str(next((SHIPPED / "scenes").glob("archivo*"))), 48)


class ColourSegmenter:
    """Whatever in a box is unlike the colour along the picture's edge. Coarse, honest, instant."""

    name, sha256 = "colour", "0" * 64

    def embed(self, picture_HW3: np.ndarray) -> Embedding:
        features = picture_HW3.astype(np.float32).transpose(2, 0, 1)[None]
        return Embedding(
            key=embedding_key(picture_HW3, self.sha256),
            features_1CGG=features,
            size=picture_HW3.shape[:2],
            model=self.name,
            model_sha256=self.sha256,
        )

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        pixels = embedding.features_1CGG[0]
        edge = np.median(np.concatenate([pixels[:, 0], pixels[:, -1]], 1), axis=1)
        unlike = np.abs(pixels - edge[:, None, None]).max(0) > 60
        masks = np.zeros((len(prompts), *embedding.size), bool)
        for mask, prompt in zip(masks, prompts, strict=True):
            x0, y0, x1, y1 = (round(v) for v in prompt.box or (0, 0, *embedding.size[::-1]))
            window = slice(max(y0, 0), y1), slice(max(x0, 0), x1)
            mask[window] = unlike[window]
        count = len(prompts)
        return Masks(
            masks_PHW=masks,
            low_res_PLL=np.zeros((count, 256, 256), np.float32),
            predicted_iou_P=np.full(count, 0.9, np.float32),
            stability_P=np.full(count, 0.9, np.float32),
        )


def sign(text: str, at: tuple[int, int] = (40, 30), size: tuple[int, int] = (120, 320)):
    """Dark text on a light wall, its true ink, and the word."""
    canvas = Image.new("L", size[::-1])
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=FONT)
    ink = np.asarray(canvas) >= 128
    picture = np.full((*size, 3), 225, np.uint8)
    picture[ink] = (30, 40, 90)
    x0, y0, x1, y1 = (at[i % 2] + v for i, v in enumerate(FONT.getbbox(text)))
    polygon = ((x0 - 3, y0 - 3), (x1 + 3, y0 - 3), (x1 + 3, y1 + 3), (x0 - 3, y1 + 3))
    return picture, ink, WordAnnotation(text=text, polygon=polygon)


def arch(text: str, radius: float = 120.0):
    """Letters along an arch: picture, ink, an 18-point polygon, and each letter's middle."""
    canvas, centres = Image.new("L", (320, 200)), []
    step = 0.42
    angles = [-math.pi / 2 + step * (n - (len(text) - 1) / 2) for n in range(len(text))]
    for letter, angle in zip(text, angles, strict=True):
        tile = Image.new("L", (80, 80))
        ImageDraw.Draw(tile).text((40, 40), letter, fill=255, font=FONT, anchor="mm")
        turned = tile.rotate(-math.degrees(angle + math.pi / 2), Image.Resampling.BICUBIC)
        x, y = 160 + radius * math.cos(angle), 170 + radius * math.sin(angle)
        canvas.paste(255, (round(x) - 40, round(y) - 40), turned)
        centres.append((x, y))
    ends = np.linspace(angles[0] - step / 2, angles[-1] + step / 2, 9)
    rims = [(radius + 24, ends), (radius - 24, ends[::-1])]
    polygon = tuple(
        (160 + r * math.cos(a), 170 + r * math.sin(a)) for r, rim in rims for a in rim.tolist()
    )
    ink = np.asarray(canvas) >= 128
    picture = np.full((200, 320, 3), 225, np.uint8)
    picture[ink] = (20, 90, 40)
    return picture, ink, polygon, centres


@pytest.fixture
def annotator() -> CharSam:
    return CharSam(ColourSegmenter())


def test_every_letter_gets_its_own_pixels(annotator: CharSam) -> None:
    picture, ink, word = sign("Harbour")
    result = annotator.annotate(picture, [word])
    (found,) = result.words
    assert [c.char for c in found.characters] == list("Harbour")
    assert mask_iou(result.mask(), ink) > 0.95
    assert sum(c.mask.area for c in found.characters) == found.mask.area
    assert found.refused is None
    assert found.score == min(c.score for c in found.characters)
    assert result.decoder_calls == 1 + 2 * 7


def test_the_boxes_stand_where_the_letters_are(annotator: CharSam) -> None:
    picture, _, word = sign("Hot")
    for character in annotator.annotate(picture, [word]).words[0].characters:
        before = FONT.getlength("Hot"[: character.index])
        own = FONT.getbbox("Hot"[character.index])
        assert abs(character.box[0] - (40 + before + own[0])) < 3


def test_a_written_space_gets_no_mask(annotator: CharSam) -> None:
    picture, _, word = sign("To go")
    found = annotator.annotate(picture, [word]).words[0]
    assert [(c.char, c.index) for c in found.characters] == [
        ("T", 0), ("o", 1), ("g", 3), ("o", 4)
    ]  # fmt: skip


def test_a_one_letter_word_is_a_word(annotator: CharSam) -> None:
    picture, ink, word = sign("W")
    result = annotator.annotate(picture, [word])
    assert mask_iou(result.words[0].characters[0].mask.paint(result.size), ink) > 0.95


def test_the_other_case_is_recognised_and_flagged(annotator: CharSam) -> None:
    picture, _, word = sign("GARAGE")
    small = WordAnnotation(text="garage", polygon=word.polygon)
    found = annotator.annotate(picture, [small]).words[0]
    flagged = [c.char for c in found.characters if "other_case" in c.flags]
    assert set("gae") <= set(flagged)
    assert "".join(c.char for c in found.characters) == "garage"


def test_white_text_in_a_white_halo_is_told_from_it(annotator: CharSam) -> None:
    _, ink, word = sign("Hello")
    halo = np.clip(2.2 * gaussian_filter(ink.astype(float), 6), 0, 1)[..., None]
    picture = np.full((*ink.shape, 3), (200, 60, 40.0))
    picture += halo * (np.array([225.0, 225, 225]) - picture)
    picture[ink] = 255
    result = annotator.annotate(picture.round().astype(np.uint8), [word])
    assert mask_iou(result.mask(), ink) > 0.9


def test_bent_words_are_cut_along_their_bend(annotator: CharSam) -> None:
    picture, ink, polygon, centres = arch("ARCHES")
    result = annotator.annotate(picture, [WordAnnotation(text="ARCHES", polygon=polygon)])
    assert mask_iou(result.mask(), ink) > 0.9
    for character, centre in zip(result.words[0].characters, centres, strict=True):
        x0, y0, x1, y1 = character.box
        assert x0 < centre[0] < x1
        assert y0 < centre[1] < y1


def test_small_punctuation_is_kept_and_flagged(annotator: CharSam) -> None:
    picture, ink, word = sign("A-")
    thin = picture.copy()
    row = np.flatnonzero(ink[:, 80:].any(1))
    thin[row[3:], 62:] = 225
    dash = annotator.annotate(thin, [word]).words[0].characters[1]
    assert dash.mask.area > 0
    assert "small" in dash.flags


def test_a_word_over_the_edge_is_clipped_and_flagged(annotator: CharSam) -> None:
    picture, _, word = sign("Pixel", at=(250, 30))
    assert word.hull[2] > 320
    found = annotator.annotate(picture, [word]).words[0]
    assert "clipped" in found.flags
    assert found.mask.x + found.mask.window_hw.shape[1] <= 320


def test_text_written_downwards(annotator: CharSam) -> None:
    picture = np.full((300, 120, 3), 225, np.uint8)
    canvas = Image.new("L", (120, 300))
    for place, letter in enumerate("BAR"):
        ImageDraw.Draw(canvas).text((40, 20 + 80 * place), letter, fill=255, font=FONT)
    ink = np.asarray(canvas) >= 128
    picture[ink] = (120, 20, 20)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    x0, x1, y0, y1 = columns[0] - 3, columns[-1] + 4, rows[0] - 3, rows[-1] + 4
    word = WordAnnotation(text="BAR", polygon=((x0, y0), (x1, y0), (x1, y1), (x0, y1)))
    result = annotator.annotate(picture, [word])
    boxes = [c.box for c in result.words[0].characters]
    assert boxes[0][3] < boxes[1][1] < boxes[2][1]
    assert mask_iou(result.mask(), ink) > 0.9
    # The glyphs were laid on their side with the letters.
    assert min(c.score for c in result.words[0].characters) > 0.5


def test_a_word_across_a_huge_picture_is_worked_on_at_four_megapixels_at_most() -> None:
    picture = np.zeros((4096, 4096, 3), np.uint8)
    word = WordAnnotation(text="Ab", polygon=((20, 20), (4080, 20), (4080, 4000), (20, 4000)))
    smaller = shrunk(picture, word, 2)
    assert smaller is not None
    assert np.prod(smaller.picture_HW3.shape[:2]) <= 2048 * 2048
    long = shrunk(picture, word, 400)
    assert long is not None
    assert np.prod(long.picture_HW3.shape[:2]) * 400 <= 32 * 2048 * 2048
    assert shrunk(picture[:1000], word, 2) is None


def test_masks_of_a_word_that_was_made_smaller_lie_where_the_letters_are(
    annotator: CharSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, ink, word = sign("Harbour")
    (alone,) = annotator.annotate(picture, [word]).words
    monkeypatch.setattr(shrinking, "LARGEST", 9000)  # of the crop's 21,000 pixels
    result = annotator.annotate(picture, [word])
    (found,) = result.words
    assert mask_iou(result.mask(), ink) > 0.88
    assert found.annotation == word
    assert found.flags == alone.flags
    assert sum(c.mask.area for c in found.characters) == found.mask.area == result.mask().sum()
    for shrunken, plain in zip(found.characters, alone.characters, strict=True):
        np.testing.assert_allclose(shrunken.box, plain.box, atol=2.5)
        np.testing.assert_allclose(shrunken.quad, plain.quad, atol=2.5)


def test_ignored_words_give_no_mask_and_an_area_to_leave_out(annotator: CharSam) -> None:
    picture, _, word = sign("OPEN")
    ignored = WordAnnotation(text="###", polygon=word.polygon, ignore=True)
    result = annotator.annotate(picture, [ignored, word])
    assert not result.words[0].mask.area
    assert result.ignored().sum() > 1000
    assert summarize([result]).ignored == 1
    assert summarize([result]).labelled == 1


def test_an_unknown_script_is_named_and_its_mask_refused(annotator: CharSam) -> None:
    picture, _, word = sign("OPEN")
    foreign = WordAnnotation(text="열린문들", polygon=word.polygon)
    found = annotator.annotate(picture, [foreign]).words[0]
    assert "no_glyph" in found.flags
    assert found.refused is not None
    assert found.refused.startswith("no glyph: no font has '열' (HANGUL)")
    assert all(c.mask.area for c in found.characters)
    assert summarize([annotator.annotate(picture, [foreign])]).refused == {"no glyph": 1}


def test_a_blank_wall_is_refused_with_its_reason(annotator: CharSam) -> None:
    _, _, word = sign("OPEN")
    found = annotator.annotate(np.full((120, 320, 3), 225, np.uint8), [word]).words[0]
    assert found.refused is not None
    assert found.refused.startswith("empty")
    assert "low_ink" in found.flags


def test_a_text_too_long_for_its_polygon_is_refused(annotator: CharSam) -> None:
    picture, _, _ = sign("OPEN")
    word = WordAnnotation(text="Encyclopaedia", polygon=((5, 5), (25, 5), (25, 15), (5, 15)))
    found = annotator.annotate(picture, [word]).words[0]
    assert found.refused == "text does not fit: 13 characters in a polygon of 20x10 pixels"


@pytest.mark.parametrize(
    ("polygon", "reason"),
    [
        (((5, 5), (6, 5), (6, 6), (5, 6)), "at least 2x2"),
        (((5, 5), (50, 30), (95, 55), (140, 80)), "at least 2x2"),
        (((400, 5), (450, 5), (450, 30), (400, 30)), "outside"),
        (((5, 5), (9, 5), (9, 9)), "points"),
        (((5, 5), (float("nan"), 5), (9, 9), (5, 9)), "finite"),
    ],
)
def test_an_unusable_polygon_is_named(annotator: CharSam, polygon, reason: str) -> None:
    picture, _, good = sign("OPEN")
    bad = WordAnnotation(text="no", polygon=polygon)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        annotator.annotate(picture, [good, bad])
    assert caught.value.field == "words[1].polygon"


def test_an_empty_text_is_named(annotator: CharSam) -> None:
    picture, _, word = sign("OPEN")
    with pytest.raises(InvalidRequest, match="empty") as caught:
        annotator.annotate(picture, [WordAnnotation(text=" ", polygon=word.polygon)])
    assert caught.value.field == "words[0].text"


def test_without_words_and_without_a_reader_there_is_nothing_to_do(annotator: CharSam) -> None:
    with pytest.raises(InvalidRequest, match="no reader"):
        annotator.annotate(sign("OPEN")[0])


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="between 0 and 1"):
        CharSamOptions(min_score=2.0)


def test_the_overlay_shows_every_character_in_its_own_colour(annotator: CharSam) -> None:
    picture, ink, word = sign("OPEN")
    result = annotator.annotate(picture, [word])
    drawn = overlay(picture, result)
    assert drawn.shape == picture.shape
    first = [drawn[c.mask.paint(result.size)].mean(0) for c in result.words[0].characters]
    assert min(np.abs(a - b).max() for a, b in pairwise(first)) > 30
    assert (drawn[~ink].mean(0) < 110).all()


def test_a_seed_makes_the_same_scene_and_its_boxes_fit_its_masks() -> None:
    one, again, other = (make_scene(seed, words=2, size=(240, 320)) for seed in (5, 5, 6))
    assert (one.picture_HW3 == again.picture_HW3).all()
    assert one.words == again.words
    assert one.words != other.words
    for word in one.characters:
        for character in word:
            rows, columns = np.nonzero(one.values_HW == character.value)
            x0, y0, x1, y1 = character.box
            assert x0 <= columns.min()
            assert columns.max() < x1
            assert y0 <= rows.min()
            assert rows.max() < y1


def test_measuring_tells_good_masks_from_bad_ones() -> None:
    scene = make_scene(3, words=1)
    methods = [m for m in METHODS if m.quick]
    seen = measure("made", [scene], ColourSegmenter(), font_set(), methods=methods)
    assert (seen.words, seen.characters) == (1, len(scene.words[0].text))
    assert seen.iou(COLOUR) > 0.5
    assert set(seen.overlaps) == set(methods)
    checks = scene_checks(seen)
    text = report([seen], checks, "colour")
    assert "+ registered + stroke colour" in text
    assert as_json([seen], checks, "colour")["groups"][0]["words"] == 1


def test_without_the_model_the_evaluation_says_how_to_get_it(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--segmenter", f"{tmp_path}/", "--made", "1"]) == 2
    assert "encoder.onnx" in capsys.readouterr().err


# The real model.


@pytest.fixture(scope="module")
def sam():
    try:
        return load_segmenter()
    except WeightsError as error:
        pytest.skip(f"run `make models`: {error.message}")


@pytest.mark.slow
def test_each_step_of_the_method_is_worth_it_on_scenes_made_here(sam) -> None:
    methods = [WORD, CHARACTER, GLYPH, COLOUR]
    scenes = gather(None, 2)
    seen = measure("made", next(iter(scenes.values())), sam, font_set(), methods=methods)
    assert seen.iou(WORD) < seen.iou(CHARACTER) < seen.iou(GLYPH) < seen.iou(COLOUR)
    assert seen.iou(COLOUR) > 0.8
    assert seen.boxes_found("both, text colour + cuts") > 0.9


@pytest.mark.slow
def test_a_word_of_six_letters_costs_few_decoder_calls(sam) -> None:
    picture, ink, word = sign("Bakery")
    result = CharSam(sam).annotate(picture, [word])
    assert result.decoder_calls < 25
    assert mask_iou(result.mask(), ink) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_the_order_holds_on_every_photograph(sam, number: int) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the photographs are not in {DATA}")
    scene = load_photographs(DATA / "scene_text" / "real")[number]
    methods = [WORD, CHARACTER, GLYPH]
    seen = measure(scene.name, [scene], sam, font_set(), methods=methods)
    assert seen.iou(WORD) < seen.iou(CHARACTER) < seen.iou(GLYPH)
