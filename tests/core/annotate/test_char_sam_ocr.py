"""The reader of the wheel: finding words, and voting on where their characters stand."""

import numpy as np
import pytest
from gesso_core.annotate.char_sam.glyphs import SHIPPED
from gesso_core.annotate.char_sam.ocr import WheelReader
from gesso_core.annotate.char_sam.vote import vote_on_strip
from PIL import Image, ImageDraw, ImageFont

pytestmark = pytest.mark.slow  # as a whole

pytest.importorskip("rapidocr_onnxruntime", reason="install gesso[ocr]")
FONT = ImageFont.truetype(str(next((SHIPPED / "scenes").glob("archivo*"))), 48)


@pytest.fixture(scope="module")
def reader() -> WheelReader:
    return WheelReader()


def sign(text: str) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    canvas = Image.new("RGB", (400, 140), (240, 240, 230))
    ImageDraw.Draw(canvas).text((60, 40), text, fill=(20, 30, 80), font=FONT)
    x0, y0, x1, y1 = FONT.getbbox(text)
    return np.asarray(canvas), (60 + x0, 40 + y0, 60 + x1, 40 + y1)


def read(log_probs: np.ndarray, alphabet) -> str:
    path = log_probs.argmax(1)
    kept = [label for n, label in enumerate(path) if label and (n == 0 or path[n - 1] != label)]
    return "".join(alphabet[label] for label in kept)


def test_words_are_found_read_and_marked_as_read_by_a_machine(reader: WheelReader) -> None:
    picture, (x0, y0, x1, y1) = sign("Harbour")
    (word,) = reader.find(picture)
    assert word.text == "Harbour"
    assert word.source == "ocr"
    assert 0.5 < word.confidence <= 1.0
    left, top, right, bottom = word.hull
    assert max(abs(left - x0), abs(right - x1), abs(top - y0), abs(bottom - y1)) < 15


def test_a_blank_wall_has_no_words(reader: WheelReader) -> None:
    assert reader.find(np.full((120, 200, 3), 230, np.uint8)) == []


def test_frames_spell_the_text_from_end_to_end(reader: WheelReader) -> None:
    picture, (x0, y0, x1, y1) = sign("Ticket")
    log_probs = reader.log_probs(picture[y0 - 4 : y1 + 4, x0 - 4 : x1 + 4])
    assert read(log_probs, reader.alphabet) == "Ticket"
    assert log_probs.shape[1] == len(reader.alphabet)
    assert np.allclose(np.exp(log_probs).sum(1), 1, atol=1e-3)
    spoken = np.flatnonzero(log_probs.argmax(1))
    assert spoken[0] < len(log_probs) * 0.25
    assert spoken[-1] > len(log_probs) * 0.75


def test_a_word_of_another_length_is_noticed(reader: WheelReader) -> None:
    picture, (x0, y0, x1, y1) = sign("Harbour")
    strip = picture[y0 - 4 : y1 + 4, x0 - 4 : x1 + 4]
    right = vote_on_strip(strip, list("Harbour"), reader)
    wrong = vote_on_strip(strip, list("Haru"), reader)
    assert right is not None
    assert wrong is not None
    assert not right.other_length
    assert wrong.other_length
    assert right.borders_n is not None
    pens = np.array([FONT.getlength("Harbour"[:n]) for n in range(8)]) + 4
    assert np.abs(right.borders_n - pens)[1:-1].max() < 16
