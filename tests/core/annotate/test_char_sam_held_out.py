"""The held-out scenes stay held out, and stay what they were when the method was measured."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.char_sam import held_out, synthetic
from gesso_core.annotate.char_sam.evaluate import HELD_OUT, gather, scene_checks
from gesso_core.annotate.char_sam.glyphs import SHIPPED
from gesso_core.annotate.char_sam.held_out import FONTS, SCENES, WORDS, held_out_scene
from gesso_core.annotate.char_sam.held_out_walls import PHOTOGRAPHS
from gesso_core.annotate.char_sam.measure import CHARACTER, COLOUR, GLYPH, WORD, Measured
from gesso_core.annotate.masks import Overlap

DATA = Path(__file__).parents[4] / "shared" / "data" / "annotation" / "scene_text"
# What the development scenes and the photographs say, what they are set in and stand on.
SEEN_WORDS = (
    "Taxi EXIT STOP Sushi Harbour Books COFFEE 24h Flowers SALE MARKET 1987 OPEN Bakery Pizza "
    "ROAD Hotel PLATFORM Seoul Pyeongyang 56Km 205Km 315 309 W Yuyuan Rd. E ALL YEAR ROUND OCBC "
    "Bank 70 Octavia Hill Social Reformer Army Cadets 1887-90 10 Genexis Theatre [06] Carpark "
    "WHY PAY FOR NOTHING? citi SMRT"
)
SEEN_FAMILIES = ("liberation", "dejavu", "bebas", "comic", "roboto", "open", "noto")
SEEN_WALLS = {"astronaut", "coffee", "chelsea", "rocket", "brick", "gravel", "grass"}
FROZEN = "b47378df91c9772254e1e049364971178784f0bd4e3635ce0613af454d72d7e5"


def hashes(folder: str) -> dict[str, str]:
    """sha256 of each font of a folder by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((SHIPPED / folder).glob("*.woff2"))
    }


def test_no_held_out_font_is_a_template_or_set_other_scenes() -> None:
    held, seen = hashes("held_out"), hashes("templates") | hashes("scenes")
    assert set(held) == {f"{name}.woff2" for name in FONTS}
    assert not set(held.values()) & set(seen.values())
    families = {name.split("-")[0] for name in seen} | set(SEEN_FAMILIES)
    assert not any(name.startswith(tuple(families)) for name in held)


def test_no_held_out_word_or_photograph_is_in_other_scenes() -> None:
    seen = {word.casefold() for word in [*SEEN_WORDS.split(), *synthetic.WORDS]}
    held = [word.casefold() for word in WORDS]
    assert len(set(held)) == len(held) == SCENES * held_out.PER_SCENE
    assert not set(held) & seen
    assert not set(PHOTOGRAPHS) & SEEN_WALLS


def test_the_words_and_fonts_said_to_be_seen_are_those_of_the_data() -> None:
    if not DATA.is_dir():
        pytest.skip(f"the development scenes are not in {DATA}")
    listed = set(SEEN_WORDS.casefold().split())
    for folder in ("synthetic", "real"):
        for entry in json.loads((DATA / folder / "words.json").read_text()):
            for word in entry["words"]:
                if word.get("script", "latin") == "latin":
                    assert set(word["text"].casefold().split()) <= listed
                assert word.get("font", "Open").lower().startswith(SEEN_FAMILIES)


def test_the_held_out_set_is_the_one_that_was_measured() -> None:
    digest = hashlib.sha256(f"{held_out.FIRST_SEED} {' '.join(WORDS)}".encode())
    for name in FONTS:
        digest.update((held_out.FOLDER / f"{name}.woff2").read_bytes())
    assert digest.hexdigest() == FROZEN, "another set needs another measurement"
    listed = (SHIPPED / "README.md").read_text()
    for folder in ("held_out", "scenes", "templates"):
        for name, sha256 in hashes(folder).items():
            assert re.search(rf"\| {folder} \| {name} \|.*`{sha256}`", listed), name


def test_a_held_out_scene_is_always_the_same_and_its_masks_fit_its_boxes() -> None:
    (one,), again = gather(None, 0, held_out=1)[HELD_OUT], held_out_scene(0)
    assert (one.picture_HW3 == again.picture_HW3).all()
    assert (one.values_HW == again.values_HW).all()
    assert one.words == again.words
    assert [word.text for word in one.words] == list(WORDS[: held_out.PER_SCENE])
    for characters in one.characters:
        for character in characters:
            rows, columns = np.nonzero(one.values_HW == character.value)
            x0, y0, x1, y1 = character.box
            assert x0 <= columns.min() <= columns.max() < x1
            assert y0 <= rows.min() <= rows.max() < y1
    # Ink is not the colour of what is next to it.
    inside = one.picture_HW3[one.truth(0)].mean(0)
    assert np.abs(inside - one.picture_HW3[: one.values_HW.shape[0] // 3].mean((0, 1))).max() > 30


def test_a_missed_bound_is_told_for_held_out_scenes_and_a_broken_promise_elsewhere() -> None:
    ious = {WORD: 50, CHARACTER: 60, GLYPH: 74, COLOUR: 83}
    seen = Measured("a set", {m: Overlap(n, 100 - n, 0) for m, n in ious.items()})
    seen.box_ious = {
        source: [0.4, 0.9] for source in ("advance widths", "both, text colour + cuts")
    }
    told = scene_checks(seen, told_only=True)
    assert {check.verdict for check in told} == {"below", "reached", "kept"}
    assert {check.verdict for check in scene_checks(seen)} == {"BROKEN", "kept"}
