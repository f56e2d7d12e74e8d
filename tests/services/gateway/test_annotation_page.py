"""The annotation page in a real Chromium: choose a picture, point at things, see their labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_page import PATIENCE_S, AnnotationPage
from chromium import start_chromium
from PIL import Image, ImageDraw, ImageFont
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.browser, pytest.mark.broker]

WIDTH, HEIGHT = 320, 160
NOT_THIS = [161, 54, 31]
CALIBRATION = """P2: 160 0 160 0 0 160 80 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with a word, the same lying on its side with a note that says so, and a frame."""
    folder = tmp_path_factory.mktemp("pictures")
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210))
    font = ImageFont.load_default(80)
    ImageDraw.Draw(image).text((160, 80), "OPEN", (20, 30, 80), font, anchor="mm")
    image.save(folder / "sign.png")
    note = Image.Exif()
    note[0x0112] = 6  # turn right to stand upright
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=note)
    (folder / "note.txt").write_text("no picture")
    (folder / "calib.txt").write_text(CALIBRATION)
    rng = np.random.default_rng(0)
    road = [rng.uniform(4, 30, 3000), rng.uniform(-8, 8, 3000), np.full(3000, -1.7)]
    back = [np.full(400, 8.0), rng.uniform(-0.8, 0.8, 400), rng.uniform(-1.6, -0.2, 400)]
    points = np.concatenate([np.column_stack(road), np.column_stack(back)])
    scan = np.column_stack([points, np.ones(len(points))]).astype("<f4")
    (folder / "scan.bin").write_bytes(scan.tobytes())
    return folder


@pytest.fixture
def page(chromium: webdriver.Chrome, annotator: Any) -> AnnotationPage:
    page = AnnotationPage(chromium, f"{annotator.url}/annotate")
    page.until(lambda: page["status"].text == "ready")
    return page


def test_a_click_lays_a_mask_over_the_picture_and_the_next_is_of_a_known_picture(
    page: AnnotationPage, files: Path
) -> None:
    page.open(files / "sign.png")
    bare = page.stage_pixels
    page.point(0.2, 0.5)
    page.until(lambda: page.labels, PATIENCE_S)
    assert "IoU" in page.labels[0]
    assert page.stage_pixels != bare
    page.point(0.8, 0.2, shift=True)
    page.until(lambda: "picture known" in page["step"].text)
    page["not-this"].click()  # who has no Shift key says it so
    page.point(0.5, 0.1)
    page.until(lambda: page.colour(0.5, 0.1) == page.colour(0.8, 0.2) == NOT_THIS)
    page.until(page["keep"].is_enabled)  # not while the answer to the last click is on its way
    page["keep"].click()
    page.drag(0.1, 0.2, 0.9, 0.8)
    page.until(lambda: len(page.labels) == 2)
    page["undo"].click()
    page.until(lambda: len(page.labels) == 1)
    page["undo"].click()
    page.until(lambda: page.labels == [])
    assert page.stage_pixels == bare
    assert page.complaints() == []


def test_words_that_a_person_marks_and_types_come_back_with_their_characters(
    page: AnnotationPage, files: Path
) -> None:
    page.open(files / "sign.png")
    page.look_for("text")
    bare = page.stage_pixels
    page.drag(0.1, 0.2, 0.9, 0.8)
    page["words"].find_element(By.TAG_NAME, "input").send_keys("OPEN")
    page.label()
    assert page["error"].text == ""
    assert page.labels[0].startswith("OPEN")
    assert page.stage_pixels != bare
    assert [link.text for link in page["exports"].find_elements(By.TAG_NAME, "button")] == [
        "coco",
        "yolo",
        "label-studio",
        "textseg",
        "picture",
    ]
    page.driver.find_element(By.CSS_SELECTOR, "#found summary").click()
    assert "char-sam" in page["provenance"].text
    page["words"].find_element(By.TAG_NAME, "button").click()
    assert not page["found"].is_displayed()  # labels of words that are no longer asked for
    assert page.stage_pixels == bare
    assert page.complaints() == []


def test_words_are_read_where_none_is_marked_also_of_a_photograph_on_its_side(
    page: AnnotationPage, files: Path
) -> None:
    page.open(files / "turned.jpg")
    size = page["stage"].size
    assert size["width"] > size["height"]
    page.look_for("text")
    page.label()
    assert [label.split()[0] for label in page.labels] == ["OPEN"]


def test_a_marked_word_without_text_is_asked_for(page: AnnotationPage, files: Path) -> None:
    page.open(files / "sign.png")
    page.look_for("text")
    page.drag(0.1, 0.2, 0.9, 0.8)
    page.driver.execute_script("document.activeElement.blur()")
    page.label()
    assert "Type what this word says" in page["error"].text
    assert page.driver.switch_to.active_element.get_attribute("placeholder") == "what it says"
    assert page["start"].is_enabled()


def test_a_job_does_not_outlive_the_picture_it_is_about(page: AnnotationPage, files: Path) -> None:
    page.open(files / "sign.png")
    page.look_for("text")
    page["start"].click()
    page.look_for("click")
    page.until(lambda: page["step"].text == "stopped")
    assert page.labels == []
    assert not page["stop"].is_displayed()


def test_a_server_that_is_gone_is_said_to_be_gone(page: AnnotationPage, files: Path) -> None:
    page.open(files / "sign.png")
    page.look_for("text")
    page.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    page.label()
    page.driver.delete_network_conditions()
    assert page["error"].text == "The server does not answer; try again when it is back."


def test_cars_stand_in_the_picture_and_beside_it_from_above(
    page: AnnotationPage, files: Path
) -> None:
    page.open(files / "sign.png")
    page.look_for("cars")
    page.drag(0.3, 0.4, 0.7, 0.85)
    page.label()
    assert "calibration" in page["error"].text
    page.choose("calibration", files / "calib.txt")
    page.choose("points", files / "scan.bin")
    page["meshes"].click()
    page.label()
    assert page["error"].text == ""
    assert page["above"].is_displayed()
    assert int(page["above"].get_property("naturalWidth")) > 0
    assert len(page.labels) == 1
    assert "kitti" in page["exports"].text
    assert page.complaints() == []


def test_what_is_no_picture_is_said_to_be_none(page: AnnotationPage, files: Path) -> None:
    page.choose("image", files / "note.txt")
    page.until(lambda: "note.txt is no picture" in page["error"].text)
    assert page["image"].get_attribute("value") == ""


def test_a_picture_can_be_dropped(page: AnnotationPage) -> None:
    page.driver.execute_async_script("""
        const done = arguments[0];
        Object.assign(document.createElement("canvas"), {width: 40, height: 20}).toBlob((blob) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([blob], "dropped.png", {type: "image/png"}));
            const drop = new DragEvent("drop", {dataTransfer, cancelable: true});
            document.getElementById("frame").dispatchEvent(drop);
            done();
        });
    """)
    page.until(lambda: page["frame"].get_attribute("data-state") == "shown")
    assert page["image"].get_attribute("value").endswith("dropped.png")
    assert page["stage"].get_attribute("width") == "40"


def test_it_fits_a_telephone(page: AnnotationPage, files: Path) -> None:
    page.driver.set_window_size(390, 844)
    page.open(files / "sign.png")
    assert page.sideways == 0
    page.driver.set_window_size(1200, 860)


def test_a_closed_server_asks_for_a_key_and_says_when_nobody_annotates(
    chromium: webdriver.Chrome, start_gateway: Any
) -> None:
    page = AnnotationPage(chromium, f"{start_gateway(api_keys='open sesame').url}/annotate")
    page.until(page["key-box"].is_displayed)
    page["key"].send_keys("open sesame", Keys.TAB)
    page.until(lambda: page["error"].text == "No model of this server can do that.")
