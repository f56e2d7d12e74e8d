"""``gesso annotate`` as a person types it: folders, bad files, stops in between, data sets."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gesso_core.annotate import fetch
from gesso_core.annotate.kitti.labels import KittiObject, format_labels, read_labels
from gesso_core.annotate.slf.synthetic import synthetic_frames
from gesso_core.hub.store import DEFAULT_STORE
from gesso_core.pipelines.pictures import blank_picture, decode_picture, encode_picture
from gesso_services.cli.main import app
from gesso_services.client import ApiError, AsyncGesso, Gesso
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

pytestmark = pytest.mark.broker

WIDTH, HEIGHT = 200, 96
POLYGON = [[20, 24], [180, 24], [180, 72], [20, 72]]
CALIBRATION = """P2: 720 0 610 44 0 720 175 0.2 0 0 1 0.003
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
"""


def sign(text: str) -> bytes:
    """Dark letters on a light wall."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 225, 210))
    font = ImageFont.load_default(48)
    ImageDraw.Draw(image).text((100, 48), text, (20, 30, 80), font, anchor="mm")
    return encode_picture(np.asarray(image))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, annotator: Any) -> Any:
    """Run ``gesso annotate`` in an empty folder, with a server at GESSO_URL."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        env = {"COLUMNS": "300", "TERM": "dumb", "GESSO_URL": annotator.url}
        return CliRunner().invoke(app, ["annotate", *words], env=env)

    return run


def write_signs(folder: Path, *texts: str) -> Path:
    """A picture per text, a file of their words beside the folder, and one file that is broken."""
    (folder / "more").mkdir(parents=True)
    names = [f"more/{text}.png" if n else f"{text}.png" for n, text in enumerate(texts)]
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_bytes(sign(text))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    entries = [
        {"image": name, "words": [{"text": text, "polygon": POLYGON}]}
        for name, text in zip([*names, "broken.jpg"], [*texts, "x"], strict=True)
    ]
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(entries))
    return path


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_a_folder_becomes_a_coco_data_set_and_the_broken_file_a_line(
    run: Any, tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools", reason="pip install pycocotools")
    from pycocotools import mask as coco_mask

    words = write_signs(tmp_path / "signs", "OPEN", "EXIT")
    result = run("text", "signs", "--words", str(words), "--out", "out")
    assert result.exit_code == 1, result.output
    assert "2 done, 0 were done before, 1 failed" in result.stdout
    assert "broken.jpg: " in result.stderr
    lines = {line["name"]: line for line in manifest(tmp_path / "out")}
    assert {name: line["status"] for name, line in lines.items()} == {
        "OPEN.png": "done",
        "more/EXIT.png": "done",
        "broken.jpg": "failed",
    }
    assert lines["broken.jpg"]["field"] == "image"
    data = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["OPEN.png", "more/EXIT.png"]
    ids = [annotation["id"] for annotation in data["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for annotation in data["annotations"]:
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"]
    overlay = tmp_path / "out" / "overlays" / "more" / "EXIT.png.png"
    assert decode_picture(overlay.read_bytes()).shape == (HEIGHT, WIDTH, 3)

    again = run("text", "signs", "--words", str(words), "--out", "out", "--format", "yolo")
    assert "0 done, 2 were done before, 1 failed" in again.stdout
    root = tmp_path / "out" / "yolo"
    assert {path.stem for path in (root / "labels").iterdir()} == {"OPEN", "more__EXIT"}
    assert {path.stem for path in (root / "images").iterdir()} == {"OPEN", "more__EXIT"}


@pytest.mark.parametrize(
    ("wanted", "file"),
    [("textseg", "textseg/mask/OPEN.png"), ("label-studio", "label-studio.json")],
)
def test_a_single_picture_and_the_other_formats(
    run: Any, tmp_path: Path, wanted: str, file: str
) -> None:
    words = write_signs(tmp_path / "signs", "OPEN")
    result = run("text", "signs/OPEN.png", "--words", str(words), "--format", wanted)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "annotated-text" / file).stat().st_size > 0


def test_tasks_for_label_studio_name_the_pictures_as_its_local_files(
    run: Any, tmp_path: Path
) -> None:
    words = write_signs(tmp_path / "two words", "OPEN")
    (tmp_path / "two words" / "broken.jpg").unlink()
    result = run("text", "two words", "--words", str(words), "--format", "label-studio")
    assert result.exit_code == 0, result.output
    (task,) = json.loads((tmp_path / "annotated-text" / "label-studio.json").read_text())
    assert task["data"] == {"image": "/data/local-files/?d=two%20words/OPEN.png"}


def test_what_lies_in_the_output_folder_is_not_annotated_again(run: Any, tmp_path: Path) -> None:
    words = write_signs(tmp_path / "signs", "OPEN")
    (tmp_path / "signs" / "broken.jpg").unlink()
    arguments = ("text", "signs", "--words", str(words), "--out", "signs/out")
    assert "1 done, 0 were done before, 0 failed" in run(*arguments).stdout
    assert "0 done, 1 were done before, 0 failed" in run(*arguments).stdout


def test_a_picture_that_the_words_do_not_name_is_a_line(run: Any, tmp_path: Path) -> None:
    words = write_signs(tmp_path / "signs", "OPEN")
    (tmp_path / "signs" / "broken.jpg").unlink()
    (tmp_path / "signs" / "new.png").write_bytes(sign("NEW"))
    result = run("text", "signs", "--words", str(words), "--out", "out")
    assert "1 done, 0 were done before, 1 failed" in result.stdout
    assert "has no entry for new.png" in result.stderr


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_and_no_picture_is_done_twice(
    run: Any, tmp_path: Path, annotator: Any
) -> None:
    texts = [f"W{number}" for number in range(14)]
    words = write_signs(tmp_path / "signs", *texts)
    (tmp_path / "signs" / "broken.jpg").unlink()
    before = {job.id for job in jobs_of(annotator)}
    arguments = ["text", "signs", "--words", str(words), "--out", "out", "--window", "4"]
    victim = subprocess.Popen(
        [sys.executable, "-m", "gesso_services.cli.main", "annotate", *arguments],
        env={**os.environ, "GESSO_URL": annotator.url},
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "out" / "manifest.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not path.is_file() or path.read_text().count("\n") < 3:
            assert time.monotonic() < deadline
            assert victim.poll() is None
            time.sleep(0.01)
    finally:
        victim.kill()
        victim.wait()
    with path.open("a") as file:
        file.write('{"name": "cut o')  # as a sudden end leaves it
    kept = path.read_text().count("\n")
    assert kept < len(texts)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"{len(texts) - kept} done, {kept} were done before, 0 failed" in result.stdout
    done = [json.loads(line) for line in path.read_text().splitlines() if "cut o" not in line]
    assert sorted(line["name"] for line in done) == sorted(
        f"more/{text}.png" if number else f"{text}.png" for number, text in enumerate(texts)
    )
    after = {job.id for job in jobs_of(annotator)} - before
    assert len(after) == len(texts)


def jobs_of(annotator: Any) -> list[Any]:
    with Gesso(annotator.url) as gesso:
        return gesso.jobs(limit=200)


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """Three frames: one as it should be, one without cars, one without calibration."""
    (frame,) = synthetic_frames(1)
    root, points = tmp_path / "kitti" / "training", frame.scene.points_velo_N4
    assert points is not None
    for name in ("image_2", "calib", "velodyne", "label_2"):
        (root / name).mkdir(parents=True)
    cars = [
        KittiObject(kind="Car", box2d=item.box, size=(1.5, 1.6, 4.0))
        for item in frame.scene.objects
    ][:2]
    for name in ("000000", "000001", "000002"):
        (root / "image_2" / f"{name}.png").write_bytes(encode_picture(blank_picture(375, 1242)))
        (root / "label_2" / f"{name}.txt").write_text(
            "" if name == "000001" else format_labels(cars)
        )
        if name != "000002":
            (root / "calib" / f"{name}.txt").write_text(CALIBRATION)
    (root / "velodyne" / "000000.bin").write_bytes(points.astype("<f4").tobytes())
    return tmp_path / "kitti"


def test_a_kitti_folder_becomes_label_files_and_drawings(
    run: Any, kitti: Path, tmp_path: Path
) -> None:
    result = run("cars", str(kitti), "--out", "out", "--meshes", "--occupancy", "0.5")
    assert result.exit_code == 1, result.output
    assert "2 done, 0 were done before, 1 failed" in result.stdout
    assert "000002: " in result.stderr
    assert "000002.txt is missing" in result.stderr
    out = tmp_path / "out"
    cars = read_labels(out / "label_2" / "000000.txt")
    assert all(car.score is not None for car in cars)
    assert read_labels(out / "label_2" / "000001.txt") == []
    lines = {line["name"]: line for line in manifest(out)}
    assert lines["000000"]["cars"] == len(cars) > 0
    assert (out / "meshes" / "000000.glb").read_bytes().startswith(b"glTF")
    assert (out / "occupancy" / "000000.ply").read_bytes().startswith(b"ply")
    assert decode_picture((out / "birds_eye" / "000000.png").read_bytes()).shape == (600, 500, 3)

    again = ("cars", str(kitti), "--out", "out", "--meshes", "--occupancy", "0.5", "--format")
    for wanted, place in (
        ("sustech", "sustech/label"),
        ("openlabel", "openlabel"),
        ("nuscenes", "nuscenes.json"),
    ):
        said = run(*again, wanted).stdout
        assert "0 done, 2 were done before, 1 failed" in said
        assert f"out/{place} and" in said
    results = json.loads((out / "nuscenes.json").read_text())["results"]
    assert {name: len(boxes) for name, boxes in results.items()} == {
        "000000": len(cars),
        "000001": 0,
    }
    assert len(json.loads((out / "sustech" / "label" / "000000.json").read_text())) == len(cars)
    assert json.loads((out / "sustech" / "label" / "000001.json").read_text()) == []
    assert (out / "openlabel" / "000001.json").is_file()


def test_frames_and_prompts_can_be_chosen(run: Any, kitti: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"000000": [{"point": [3000, 20]}]}')
    arguments = ("cars", str(kitti), "--prompts", "prompts.json", "--out", "out")
    result = run(*arguments, "--frames", "000000")
    assert "0 done, 0 were done before, 1 failed" in result.stdout
    (line,) = manifest(tmp_path / "out")
    assert line["field"] == "prompts.0.point"
    result = run(*arguments, "--frames", "000007")
    assert result.exit_code == 1
    assert "has no frame 000007" in result.stderr


@pytest.mark.slow
def test_without_a_server_the_real_segmenter_labels_letters_and_cars(
    run: Any, kitti: Path, tmp_path: Path
) -> None:
    folder = DEFAULT_STORE / fetch.MODEL
    if not all((folder / name).is_file() for name in fetch.SHA256):
        pytest.skip(f"{folder} lacks the real model; run `make models`")
    words = write_signs(tmp_path / "signs", "OPEN")
    result = run("text", "signs", "--words", str(words), "--local", "--out", "out")
    assert "1 done, 0 were done before, 1 failed" in result.stdout
    (done,) = [line for line in manifest(tmp_path / "out") if line["status"] == "done"]
    assert done["characters"] == ["E", "N", "O", "P"]
    result = run("cars", str(kitti), "--local", "--frames", "000000", "--out", "out")
    assert "1 done, 0 were done before, 0 failed" in result.stdout
    assert (tmp_path / "out" / "label_2" / "000000.txt").is_file()


def test_the_tables_take_their_own_options(run: Any) -> None:
    assert run("eval", "cars", "--frames", "0").exit_code == 0
    assert "--kitti" in run("eval", "cars", "--help").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("text", "empty"), "has no .png, .jpg, .jpeg, .webp file"),
        (("text", "empty", "--refine", "all"), "use box, glyph or colour"),
        (("cars", "empty"), "is no KITTI folder"),
        (("cars", "empty", "--driving-side", "up"), "use right or left"),
        (("eval", "dogs"), "use text or cars"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run: Any, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    result = run(*words)
    assert result.exit_code == 1
    assert sentence in result.stderr


def test_the_client_waits_for_labels_and_fetches_files(annotator: Any) -> None:
    told: list[Any] = []
    with Gesso(annotator.url, timeout=60) as gesso:
        words = [{"text": "OPEN", "polygon": POLYGON}]
        made = gesso.annotate_text(sign("OPEN"), words, name="a.png", on_progress=told.append)
        assert made["words"][0]["text"] == "OPEN"
        assert told[-1].total_steps == 1
        assert decode_picture(gesso.drawing(made["id"])).shape == (HEIGHT, WIDTH, 3)
        assert json.loads(gesso.export(made["id"], "coco"))["images"][0]["file_name"] == "a.png"
        (mask,) = gesso.segment(sign("OPEN"), [{"box": [10, 10, 100, 60]}])
        assert mask["mask"]["size"] == [HEIGHT, WIDTH]
        begun = [gesso.begin_text(sign("A"), words, key="one") for _ in range(2)]
        assert begun[0].id == begun[1].id
        with pytest.raises(ApiError) as caught:
            gesso.begin_text(sign("A"), [{"text": "A", "polygon": [[900, 1]] * 4}])
        assert caught.value.field == "words.0.polygon"


@pytest.mark.anyio
async def test_the_awaiting_client_does_the_same(annotator: Any) -> None:
    async with AsyncGesso(annotator.url, timeout=60) as gesso:
        words = [{"text": "OPEN", "polygon": POLYGON}]
        made = await gesso.annotate_text(sign("OPEN"), words)
        assert made["summary"]["words"] == 1
        assert await gesso.export(made["id"], "yolo")
        assert decode_picture(await gesso.drawing(made["id"])).shape == (HEIGHT, WIDTH, 3)
        assert len(await gesso.segment(sign("OPEN"), [{"box": [10, 10, 100, 60]}])) == 1
        cars = await gesso.annotate_cars(
            encode_picture(blank_picture(375, 1242)), CALIBRATION, [{"box": [500, 150, 700, 260]}]
        )
        assert len(cars["objects"]) == 1
