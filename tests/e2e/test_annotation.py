"""Annotation through the whole stack: folders while workers and commands die, and the page."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_page import PATIENCE_S, AnnotationPage
from chromium import start_chromium
from gesso_contracts import JobState
from gesso_core.annotate.char_sam.readers import words_to_json
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.kitti.labels import format_labels, read_labels
from gesso_core.annotate.slf.synthetic import SyntheticFrame, synthetic_frames
from gesso_core.pipelines.pictures import Pixels, blank_picture, encode_picture
from gesso_services.client import ApiError
from PIL import Image
from selenium.webdriver.common.by import By

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SIZE = (120, 260)  # height, width of every sign, as it stands upright
BROKEN = "broken.jpg"
STREET = [f"street/{number}.png" for number in range(4)]
GOOD = ["deep.png", "plain.webp", "print.jpg", *STREET, "turned.jpg"]
TURN_RIGHT = 6  # of EXIF: how a picture that lies on its side is to be turned
# Saying what is the default anyway makes another job that must give the same labels.
ALOUD = ("--refine", "colour")
CALIBRATION = """P2: 720 0 610 44 0 720 175 0.2 0 0 1 0.003
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
"""


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One word per picture, in the kinds of files that cameras and scanners write, one of them
    broken; the words lie beside the folder.
    """
    folder = tmp_path_factory.mktemp("signs") / "signs"
    (folder / "street").mkdir(parents=True)
    scenes = {name: make_scene(300 + n, words=1, size=SIZE) for n, name in enumerate(GOOD)}
    for name, scene in scenes.items():
        write_picture(folder / name, Image.fromarray(scene.picture_HW3))
    (folder / BROKEN).write_bytes((folder / "print.jpg").read_bytes()[:3000])
    words = {Path(name).name: scene.words for name, scene in scenes.items()}
    words[BROKEN] = words["print.jpg"]
    folder.with_name("words.json").write_text(json.dumps(words_to_json(words)))
    return folder


def write_picture(path: Path, picture: Image.Image) -> None:
    if path.name == "print.jpg":
        picture.convert("CMYK").save(path)
    elif path.name == "deep.png":
        gray = np.asarray(picture.convert("L"), dtype=np.uint16)
        Image.fromarray(gray * 257).save(path)
    elif path.name == "turned.jpg":
        note = Image.Exif()
        note[0x0112] = TURN_RIGHT
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=note)
    else:
        picture.save(path)


def annotate(stack: Any, *words: object) -> "subprocess.Popen[str]":
    """``gesso annotate`` as a person starts it."""
    command = [sys.executable, "-m", "gesso_services.cli.main", "annotate", *map(str, words)]
    environment = os.environ | {"GESSO_URL": stack.url, "COLUMNS": "300", "TERM": "dumb"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def annotate_signs(
    stack: Any, signs: Path, out: Path, *more: str, part: str = "", window: int = 4
) -> "subprocess.Popen[str]":
    words = signs.with_name("words.json")
    options = ("--words", words, "--out", out, "--window", window, *more)
    return annotate(stack, "text", signs / part, *options)


def ended(command: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, output and complaints of a command that is waited for."""
    try:
        output, complaints = command.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        command.kill()
        pytest.fail(f"the command did not end: {command.communicate()}")
    return command.returncode, output, complaints


def manifest(out: Path) -> list[dict[str, Any]]:
    path = out / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def labels(out: Path, names: list[str]) -> list[bytes]:
    return [(out / "labels" / f"{name}.json").read_bytes() for name in names]


def jobs(stack: Any, status: str | None = None) -> dict[str, JobState]:
    """Those of the annotation service, of the 200 that changed last."""
    with stack.client() as gesso:
        listed = gesso.jobs(status=status, limit=200)
    ours = [job for job in listed if job.service == "annotation"]
    assert len({job.id for job in ours}) == len(ours), "a job is listed twice"
    return {job.id: job for job in ours}


@pytest.fixture(scope="module")
def undisturbed(stack: Any, signs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of the folder when nothing goes wrong."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, output, _ = ended(annotate_signs(stack, signs, out, *ALOUD))
    assert code == 1
    assert f"{len(GOOD)} done, 0 were done before, 1 failed" in output
    return out


def kill_at_work(stack: Any) -> JobState:
    """Kill the replica of the annotation service while it holds a job, and return that job."""
    (replica,) = stack.replicas("annotation")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        replica.suspend()  # or it could be done between the look and the kill
        for held in jobs(stack, "running").values():
            replica.kill()
            return held
        replica.resume()
        time.sleep(0.1)
    pytest.fail("no job was running for a minute")


def test_of_a_folder_whose_worker_is_killed_nothing_is_lost_and_nothing_doubled(
    stack: Any, signs: Path, undisturbed: Path, wait_until: Any, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", jobs(stack)
    command = annotate_signs(stack, signs, out)
    wait_until(lambda: len(manifest(out)) >= 3, 60, "the broken file and two others have a line")
    held = kill_at_work(stack)
    code, output, complaints = ended(command)
    assert code == 1, complaints
    assert f"{len(GOOD)} done, 0 were done before, 1 failed" in output

    lines = manifest(out)
    assert sorted(line["name"] for line in lines) == sorted([*GOOD, BROKEN])
    (failed,) = (line for line in lines if line["status"] != "done")
    assert (failed["name"], failed["field"]) == (BROKEN, "image")
    assert failed["error"] in complaints
    new = {key: job for key, job in jobs(stack).items() if key not in before}
    assert new.keys() == {line["job"] for line in lines if line["status"] == "done"}
    assert {job.status for job in new.values()} == {"succeeded"}
    assert new[held.id].attempt > held.attempt >= 1

    assert {(line["height"], line["width"]) for line in lines if line is not failed} == {SIZE}
    assert labels(out, GOOD) == labels(undisturbed, GOOD)
    data = json.loads((out / "coco.json").read_text())
    assert [image["file_name"] for image in data["images"]] == GOOD
    assert data["annotations"] == json.loads((undisturbed / "coco.json").read_text())["annotations"]

    code, output, _ = ended(annotate_signs(stack, signs, out))
    assert f"0 done, {len(GOOD)} were done before, 1 failed" in output
    assert jobs(stack).keys() == before.keys() | new.keys()


def test_a_command_that_is_killed_goes_on_where_it_was(
    stack: Any, signs: Path, undisturbed: Path, wait_until: Any, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", jobs(stack)
    command = annotate_signs(stack, signs, out, part="street", window=2)
    wait_until(lambda: bool(manifest(out)), 60, "the first picture has a line")
    command.kill()
    ended(command)
    kept = len(manifest(out))
    assert {line["status"] for line in manifest(out)} == {"done"}
    assert kept < len(STREET), "the command was done before it could be killed"
    code, output, complaints = ended(annotate_signs(stack, signs, out, part="street"))
    assert code == 0, complaints
    assert f"{len(STREET) - kept} done, {kept} were done before, 0 failed" in output
    names = sorted(Path(name).name for name in STREET)
    assert sorted(line["name"] for line in manifest(out)) == names
    new = {key: job for key, job in jobs(stack).items() if key not in before}
    assert new.keys() == {line["job"] for line in manifest(out)}
    assert labels(out, names) == labels(undisturbed, sorted(STREET))


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same frame twice; the second calibration is no calibration."""
    folder = tmp_path_factory.mktemp("kitti")
    (frame,) = synthetic_frames(1)
    points = frame.scene.points_velo_N4
    assert points is not None
    cars = [label for label in frame.labels if label.occluded == 0][:3]
    for name, calibration in (("000000", CALIBRATION), ("000001", "P2: 1 2 3\n")):
        files = {
            f"image_2/{name}.png": encode_picture(painted(frame)),
            f"calib/{name}.txt": calibration.encode(),
            f"velodyne/{name}.bin": points.astype("<f4").tobytes(),
            f"label_2/{name}.txt": format_labels(cars).encode(),
        }
        for place, data in files.items():
            (folder / "training" / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / "training" / place).write_bytes(data)
    return folder


def painted(frame: SyntheticFrame) -> Pixels:
    """The masks of the cars, light on a gray street."""
    picture = blank_picture(375, 1242) // 2
    for number, item in enumerate(frame.scene.objects):
        picture[item.mask_HW] = (230, 200 - 20 * number, 60 + 25 * number)
    return picture


def test_a_frame_without_a_calibration_does_not_stop_the_others(
    stack: Any, kitti: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, output, complaints = ended(annotate(stack, "cars", kitti, "--out", out))
    assert code == 1
    assert "1 done, 0 were done before, 1 failed" in output
    assert "000001" in complaints
    lines = {line["name"]: line for line in manifest(out)}
    asked = read_labels(kitti / "training" / "label_2" / "000000.txt")
    found = read_labels(out / "label_2" / "000000.txt")
    assert lines["000000"]["cars"] == len(found)
    assert len(found) + sum(lines["000000"]["refused"].values()) == len(asked)
    assert "R0_rect is missing" in lines["000001"]["error"]
    picture = (kitti / "training" / "image_2" / "000001.png").read_bytes()
    with stack.client() as gesso, pytest.raises(ApiError) as caught:
        gesso.begin_cars(picture, "P2: 1 2 3\n", [{"point": [600, 200]}])
    assert caught.value.field == "calibration"


@pytest.fixture(scope="module")
def page(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnnotationPage]:
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    page = AnnotationPage(driver, f"{stack.url}/annotate")
    page.until(lambda: page["status"].text == "ready", PATIENCE_S)
    yield page
    driver.quit()


@pytest.mark.browser
def test_on_the_page_a_click_gives_a_mask_and_a_marked_word_its_letters(
    page: AnnotationPage, signs: Path
) -> None:
    page.open(signs / "turned.jpg")
    bare = page.stage_pixels
    page.point(0.5, 0.5)
    page.until(lambda: page.labels, PATIENCE_S)
    assert "IoU" in page.labels[0]
    assert page.stage_pixels != bare
    page.look_for("text")
    assert page.stage_pixels == bare
    (word,) = words_of(signs, "turned.jpg")
    corners = np.array(word["polygon"]) / SIZE[::-1]
    page.drag(*np.clip([*corners.min(axis=0), *corners.max(axis=0)], 0.01, 0.99))
    page["words"].find_element(By.TAG_NAME, "input").send_keys(word["text"])
    page.label()
    assert page["error"].text == ""
    assert page.labels[0].startswith(word["text"])
    assert page.stage_pixels != bare
    assert page.complaints() == []


def words_of(signs: Path, name: str) -> list[dict[str, Any]]:
    entries = json.loads(signs.with_name("words.json").read_text())
    return next(entry["words"] for entry in entries if entry["image"] == name)
