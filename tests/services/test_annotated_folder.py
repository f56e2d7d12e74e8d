"""Folders annotated file by file, without a server: what goes wrong with one file is its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gesso_core.errors import GessoError, InvalidRequest
from gesso_core.pipelines.pictures import blank_picture, encode_picture
from gesso_services.cli import annotated_folder
from gesso_services.cli.annotated_folder import Folder, Item, Made
from gesso_services.cli.annotated_sets import flat_names, write_set
from gesso_services.cli.annotation_items import car_items, text_items, words_from
from gesso_services.client_labels import JobFailed
from gesso_services.client_wire import ApiError

LABELS = {"width": 12, "height": 10, "words": []}
NOTE: dict[str, Any] = {"width": 12, "height": 10, "characters": [], "summary": {}}


class Empty:
    """Annotates pictures as empty ones; ``errors`` are raised first, one per question."""

    def __init__(self, errors: Mapping[str, list[GessoError]] | None = None) -> None:
        self.errors = errors or {}
        self.begun: list[str] = []

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        self.begun.append(item.name)
        return key

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        if errors := self.errors.get(item.name):
            raise errors.pop(0)
        return Made({f"labels/{item.name}.json": json.dumps(LABELS).encode()}, NOTE)


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_picture(blank_picture(10, 12)))
    return root


def run(root: Path, out: Path, annotates: Empty, words: Path | None = None) -> dict[str, Any]:
    """The last line of every file."""
    items = text_items(root, words_from(words), apart_from=out)
    Folder(out, annotates, {}).run(items)
    return {line["name"]: line for line in annotated_folder.lines_of(out)}


def test_a_server_that_is_busy_when_the_labels_are_fetched_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotated_folder, "WAIT_S", 0.0)
    root = pictures(tmp_path / "in", "a.png", "b.png")
    annotates = Empty(
        {
            "a.png": [ApiError(503, "unavailable", "one moment"), ApiError(429, "busy", "later")],
            "b.png": [JobFailed(503, "unavailable", "the part never came")],
        }
    )
    lines = run(root, tmp_path / "out", annotates)
    assert {name: line["status"] for name, line in lines.items()} == {
        "a.png": "done",
        "b.png": "failed",
    }
    assert annotates.begun == ["a.png", "b.png"]


def test_a_name_too_long_for_a_file_of_labels_is_a_line_and_the_others_are_done(
    tmp_path: Path,
) -> None:
    long = f"{'a' * 248}.png"  # as long as a name can be; that of its labels is longer
    lines = run(pictures(tmp_path / "in", "A.png", long, "b.png"), tmp_path / "out", Empty())
    assert [lines[name]["status"] for name in ("A.png", long, "b.png")] == [
        "done",
        "failed",
        "done",
    ]


def test_a_name_that_is_no_text_is_a_line_and_the_others_are_done(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "a.png")
    try:
        pictures(root, "b\udcff.png")
    except OSError:
        pytest.skip("this file system has no such names")
    out = tmp_path / "out"
    lines = run(root, out, Empty())
    assert sorted(line["status"] for line in lines.values()) == ["done", "failed"]
    assert write_set(out, root, "coco").is_file()


def test_words_in_another_encoding_are_a_line(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "a.png", "b.png")
    words = tmp_path / "words"
    words.mkdir()
    (words / "gt_a.txt").write_bytes("1,1,9,1,9,9,1,9,Café".encode("latin-1"))
    (words / "gt_b.txt").write_text("1,1,9,1,9,9,1,9,Café", encoding="utf-8")
    lines = run(root, tmp_path / "out", Empty(), words)
    assert "gt_a.txt is not UTF-8" in lines["a.png"]["error"]
    assert lines["b.png"]["status"] == "done"


@pytest.mark.parametrize("kind", ["words.json", "icdar"])
def test_words_of_one_picture_are_not_given_to_another_of_its_name(
    tmp_path: Path, kind: str
) -> None:
    root, source = pictures(tmp_path / "in", "a.png", "more/a.png"), tmp_path / kind
    word = {"text": "A", "polygon": [[1, 1], [9, 1], [9, 9], [1, 9]]}
    if kind == "icdar":
        source.mkdir()
        (source / "gt_a.txt").write_text("1,1,9,1,9,9,1,9,A")
    else:
        source.write_text(json.dumps([{"image": "a.png", "words": [word]}]))
    lines = run(root, tmp_path / "out", Empty(), source)
    assert lines["a.png"]["status"] == "done"
    assert "were taken for a.png already" in lines["more/a.png"]["error"]


def test_a_word_without_text_is_not_annotated_as_number_signs(tmp_path: Path) -> None:
    word = {"text": " ", "polygon": [[1, 1], [9, 1], [9, 9], [1, 9]]}
    path = tmp_path / "words.json"
    words = [word | {"ignore": False}, word | {"ignore": True}]
    path.write_text(json.dumps([{"image": "a.png", "words": words}]))
    (item,) = text_items(
        pictures(tmp_path / "in", "a.png"), words_from(path), apart_from=tmp_path / "out"
    )
    sent = json.loads(item.parts()["words"])
    assert [(word["text"], word["ignore"]) for word in sent] == [(" ", False), ("###", True)]


def test_pictures_of_one_name_keep_labels_of_their_own(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "b/c.png", "b__c.png", "d.png"]
    root, out = pictures(tmp_path / "in", *names), tmp_path / "out"
    run(root, out, Empty())
    yolo = write_set(out, root, "yolo")
    stems = {path.stem for path in (yolo / "labels").iterdir()}
    assert len(stems) == len(names)
    assert "d" in stems
    assert stems == {path.stem for path in (yolo / "images").iterdir()}
    assert flat_names(names[:2])["a.png"] == flat_names(names)["a.png"]


@pytest.mark.parametrize("wanted", ["coco", "yolo", "textseg", "label-studio"])
def test_a_picture_that_has_gone_is_named_and_the_data_set_is_without_it(
    tmp_path: Path, wanted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = pictures(tmp_path / "in", "a.png", "b.png"), tmp_path / "out"
    run(root, out, Empty())
    (root / "a.png").unlink()
    assert write_set(out, root, wanted).exists()
    assert "a.png is no longer in" in capsys.readouterr().err
    if wanted == "coco":
        data = json.loads((out / "coco.json").read_text())
        assert [image["file_name"] for image in data["images"]] == ["b.png"]


def kitti(root: Path) -> Path:
    pictures(root / "image_2", "000000.png", "000001.png")
    (root / "calib").mkdir()
    for name in ("000000", "000001"):
        (root / "calib" / f"{name}.txt").write_text(
            "P2: 9 0 6 0 0 9 5 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
            "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
        )
    return root


def test_a_frame_that_is_not_there_is_said_before_anything_is_begun(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no frame 000007"):
        next(car_items(kitti(tmp_path), ["000000", "000007"], None))


@pytest.mark.parametrize("prompts", [None, 7, {"box": [0, 0, 5, 5]}, "all"])
def test_prompts_that_are_no_list_are_a_line(tmp_path: Path, prompts: object) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"000000": prompts, "000001": [{"box": [0, 0, 5, 5]}]}))
    out = tmp_path / "out"
    Folder(out, Empty(), {}).run(car_items(kitti(tmp_path / "kitti"), [], path))
    lines = {line["name"]: line for line in annotated_folder.lines_of(out)}
    assert "expected a list" in lines["000000"]["error"]
    assert lines["000001"]["status"] == "done"
