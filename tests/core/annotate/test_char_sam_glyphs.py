"""Glyph templates, their registration, points, the choice of a mask, the colour step, merging."""

import hashlib

import numpy as np
import pytest
from gesso_core.annotate.char_sam.colour import separation, stroke_mask
from gesso_core.annotate.char_sam.glyphs import SHIPPED, font_set
from gesso_core.annotate.char_sam.ink import to_lab
from gesso_core.annotate.char_sam.merge import character_score, share_out
from gesso_core.annotate.char_sam.refine_glyphs import (
    Candidate,
    choose,
    counters,
    glyph_prompt,
)
from gesso_core.annotate.char_sam.register import register, unregistered
from gesso_core.errors import InvalidRequest


def glyph(char: str, size: tuple[int, int], edges) -> np.ndarray:
    """The bold sans glyph stretched into a box of a mask."""
    template = font_set().templates(char)[1:2]
    placed = unregistered(template, np.ones(size, bool), edges)
    assert placed is not None
    return placed.paint(size)


def test_every_shipped_font_draws_latin() -> None:
    names = [template.font for template in font_set().templates("A")]
    assert len(names) == 4
    assert len(set(names)) == 4


@pytest.mark.parametrize("char", ["é", "Ł", "Ж", "Ω", "ש", "%", "8"])
def test_shipped_fonts_cover_several_alphabets(char: str) -> None:
    assert font_set().templates(char)


@pytest.mark.parametrize("char", ["서", "愚", "ह", "\U0001f680", "\u2603"])
def test_the_box_for_a_missing_character_is_no_glyph(char: str) -> None:
    assert font_set().templates(char) == ()


def test_a_cluster_needs_a_glyph_for_its_letter_not_for_its_marks() -> None:
    assert font_set().templates("e\u0301")


def test_the_users_folder_adds_its_fonts(tmp_path) -> None:
    font = next((SHIPPED / "scenes").glob("anton*.woff2"))
    (tmp_path / font.name).write_bytes(font.read_bytes())
    assert len(font_set(tmp_path).templates("A")) == 5


def test_a_folder_without_fonts_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="no font"):
        font_set(tmp_path)
    (tmp_path / "a.ttf").write_bytes(b"no font at all")
    with pytest.raises(InvalidRequest, match="not a font"):
        font_set(tmp_path / "")


def test_every_shipped_font_is_listed_and_has_its_licence_beside_it() -> None:
    listed = (SHIPPED / "README.md").read_text()
    for folder in (SHIPPED / "templates", SHIPPED / "scenes"):
        for font in folder.glob("*.woff2"):
            assert hashlib.sha256(font.read_bytes()).hexdigest() in listed, font.name
            family = next(p for p in folder.glob("*-OFL.txt") if font.name.startswith(p.name[:-8]))
            assert "SIL OPEN FONT LICENSE" in family.read_text()


def test_registration_finds_a_glyph_from_a_wrong_box() -> None:
    size, truth = (80, 90), (22.0, 18.0, 62.0, 66.0)
    target = glyph("A", size, truth)
    wrong = (14.0, 24.0, 56.0, 74.0)
    templates = font_set().templates("A")
    before, after = unregistered(templates, target, wrong), register(templates, target, wrong)
    assert before is not None
    assert after is not None
    assert before.iou < 0.6
    assert after.iou > 0.85
    assert np.abs(np.array(after.edges) - truth).max() < 4


def test_registration_prefers_the_right_letter() -> None:
    target, box = glyph("E", (60, 60), (10.0, 10.0, 40.0, 50.0)), (9.0, 9.0, 42.0, 51.0)
    fits = {char: register(font_set().templates(char), target, box) for char in "EOX"}
    assert max(fits, key=lambda char: fits[char].iou if fits[char] else 0) == "E"


def test_nothing_to_register_gives_nothing() -> None:
    box = (1.0, 1.0, 8.0, 8.0)
    assert register((), np.ones((9, 9), bool), box) is None
    assert register(font_set().templates("A"), np.zeros((9, 9), bool), box) is None


@pytest.mark.parametrize("char", ["O", "A", "8", "D"])
def test_the_first_negative_point_lies_in_a_counter(char: str) -> None:
    mask = glyph(char, (100, 90), (15.0, 15.0, 75.0, 85.0))
    prompt = glyph_prompt(mask, np.ones_like(mask))
    labels = np.array(prompt.labels)
    points = np.array(prompt.points).astype(int)
    holes = counters(mask)
    assert holes.any()
    assert mask[points[labels == 1, 1], points[labels == 1, 0]].all()
    assert not mask[points[labels == 0, 1], points[labels == 0, 0]].any()
    x, y = points[labels == 0][0]
    assert holes[y, x]
    assert (labels == 1).sum() <= 3
    assert (labels == 0).sum() <= 3


def test_the_glyphs_mask_wins_unless_its_size_or_the_segmenter_speaks_against_it() -> None:
    full = np.ones((10, 10), bool)
    box = Candidate(full, 0.9, 0.9)
    assert choose(box, Candidate(full, 0.8, 0.9), 100).predicted_iou == 0.8
    assert choose(box, Candidate(full, 0.7, 0.9), 100) is box
    assert choose(box, Candidate(full, 0.9, 0.9), 30) is box


def test_the_colour_step_keeps_strokes_and_refuses_another_things_colour() -> None:
    mask = np.zeros((20, 20), bool)
    mask[4:16, 4:16] = True
    stroke = np.zeros_like(mask)
    stroke[4:16, 4:13] = True
    found = stroke_mask(mask, np.zeros_like(mask), stroke)
    assert found is not None
    assert (found == stroke).all()
    speck = np.zeros_like(mask)
    speck[8, 8] = True
    assert stroke_mask(mask, np.zeros_like(mask), speck) is None


def test_a_glyph_brings_back_a_stroke_that_the_mask_lost() -> None:
    ink = np.zeros((20, 30), bool)
    ink[4:16, 4:8] = ink[4:16, 20:24] = True
    mask = ink & (np.arange(30) < 10)[None]
    found = stroke_mask(mask, ink, ink)
    assert found is not None
    assert (found == ink).all()


def test_separation_counts_spreads_between_the_means() -> None:
    rng = np.random.default_rng(0)
    text = np.zeros((20, 40), bool)
    text[:, :20] = True

    def picture(light: float, spread: float) -> np.ndarray:
        gray = np.where(text, light, 100.0) + spread * rng.standard_normal(text.shape)
        return to_lab(np.repeat(gray[..., None], 3, -1).round().clip(0, 255).astype(np.uint8))

    assert separation(picture(200, 5), text, ~text) > 10
    assert separation(picture(115, 15), text, ~text) < 2


def test_shared_pixels_go_to_the_nearer_glyph() -> None:
    left, right = np.zeros((6, 20), bool), np.zeros((6, 20), bool)
    left[:, :12], right[:, 8:] = True, True
    glyphs = [np.zeros_like(left), np.zeros_like(left)]
    glyphs[0][:, 2:6], glyphs[1][:, 12:18] = True, True
    a, b = share_out([left, right], glyphs)
    assert not (a & b).any()
    assert (a | b).all()
    assert a[:, :9].all()
    assert b[:, 9:].all()


def test_a_pixel_without_any_glyph_stays_with_the_first() -> None:
    one, nothing = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    a, b = share_out([one, one], [nothing, nothing])
    assert a.all()
    assert not b.any()


def test_scores_stay_between_0_and_1() -> None:
    assert character_score(1.0015, 1.0, 1.0) == 1.0
    assert character_score(0.9, 0.9, 0.0) == pytest.approx(0.243)
