"""Files in and out: COCO-Text, ICDAR and MLT text, words.json; COCO, YOLO, PNG, Label Studio."""

import io
import json
import tracemalloc

import numpy as np
import pytest
from gesso_core.annotate.char_sam.label_studio import pack_brush, regions, task, unpack_brush
from gesso_core.annotate.char_sam.outlines import outlines, single_outline
from gesso_core.annotate.char_sam.readers import (
    read_coco_text,
    read_icdar,
    read_words_json,
    words_to_json,
)
from gesso_core.annotate.char_sam.window_runs import decode_placed, encode_placed
from gesso_core.annotate.char_sam.words import (
    CharacterMask,
    PictureResult,
    PlacedMask,
    WordAnnotation,
    WordResult,
    placed_polygon,
    polygon_mask,
    summarize,
)
from gesso_core.annotate.char_sam.writers import (
    CocoDataset,
    indexed_mask,
    indexed_png,
    textseg_json,
    write_textseg,
    yolo_classes,
    yolo_lines,
    yolo_yaml,
)
from gesso_core.annotate.masks import encode_mask
from gesso_core.errors import InvalidRequest, UnsafeFile
from PIL import Image
from skimage.draw import polygon2mask

SIZE = (40, 60)
SHEET = (37, 211)
POLYGON = ((5.0, 5.0), (45.0, 5.0), (45.0, 30.0), (5.0, 30.0))


def ring(height: int = 12, width: int = 10) -> np.ndarray:
    mask = np.ones((height, width), bool)
    mask[3:-3, 3:-3] = False
    return mask


def dotted() -> np.ndarray:
    mask = np.zeros((14, 4), bool)
    mask[:3], mask[6:] = True, True
    return mask


def character(char: str, index: int, mask: PlacedMask, **other) -> CharacterMask:
    height, width = mask.window_hw.shape
    box = (float(mask.x), float(mask.y), float(mask.x + width), float(mask.y + height))
    quad = ((box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3]))
    return CharacterMask(char=char, index=index, box=box, quad=quad, mask=mask, score=0.7, **other)


@pytest.fixture
def result() -> PictureResult:
    masks = [PlacedMask(6, 7, ring()), PlacedMask(20, 6, dotted())]
    union = np.zeros(SIZE, bool)
    for mask in masks:
        mask.add_to(union)
    word = WordResult(
        annotation=WordAnnotation(text="oi", polygon=POLYGON),
        characters=tuple(
            character(c, n, m) for n, (c, m) in enumerate(zip("oi", masks, strict=True))
        ),
        mask=PlacedMask(0, 0, union),
        score=0.7,
        seconds=2.0,
    )
    ignored = WordResult(
        annotation=WordAnnotation(
            text="###", polygon=((50, 30), (58, 30), (58, 38), (50, 38)), ignore=True
        ),
        mask=PlacedMask(0, 0, np.zeros((0, 0), bool)),
    )
    return PictureResult(size=SIZE, words=(word, ignored))


def test_icdar_lines_may_have_a_mark_commas_in_the_text_and_ignored_words() -> None:
    text = "\ufeff377,117,463,117,465,130,378,130,Genexis, Theatre\r\n1,2,9,2,9,8,1,8,###\n"
    first, second = read_icdar(text)
    assert first.text == "Genexis, Theatre"
    assert first.polygon[2] == (465.0, 130.0)
    assert not first.ignore
    assert second.ignore


def test_mlt_lines_name_their_script() -> None:
    text = "1,2,9,2,9,8,1,8,Korean,서울\n1,2,9,2,9,8,1,8,Latin,a,b\n"
    assert [(w.script, w.text) for w in read_icdar(text)] == [("korean", "서울"), ("latin", "a,b")]


@pytest.mark.parametrize("line", ["1,2,3,4,text", "1,2,9,2,x,8,1,8,text"])
def test_a_malformed_line_is_named(line: str) -> None:
    with pytest.raises(InvalidRequest, match="line 3") as caught:
        read_icdar("1,2,9,2,9,8,1,8,fine\n\n" + line)
    assert caught.value.field == "line 3"


def test_coco_text_takes_the_polygon_or_the_box_and_ignores_the_illegible() -> None:
    data = {
        "imgs": {"7": {"file_name": "a.jpg"}, "8": {"file_name": "b.jpg"}},
        "anns": {
            "1": {"image_id": 7, "bbox": [1, 2, 30, 10], "mask": [1, 2, 31, 2, 31, 12, 1, 12],
                  "utf8_string": "stop", "legibility": "legible", "language": "english"},
            "2": {"image_id": 7, "bbox": [1, 2, 30, 10], "utf8_string": "",
                  "legibility": "illegible"},
        },
    }  # fmt: skip
    words = read_coco_text(data)
    assert words["b.jpg"] == []
    stop, blurred = words["a.jpg"]
    assert (stop.text, stop.script, stop.ignore) == ("stop", "latin", False)
    assert blurred.polygon == ((1.0, 2.0), (31.0, 2.0), (31.0, 12.0), (1.0, 12.0))
    assert blurred.ignore


def test_coco_text_without_its_tables_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="imgs"):
        read_coco_text({"images": []})


def test_our_own_words_come_back_as_they_went() -> None:
    given = WordAnnotation(text="서울", polygon=POLYGON, script="hangul")
    found = WordAnnotation(text="OPEN", polygon=POLYGON, source="ocr", confidence=0.75)
    words = {"a.jpg": [given, found]}
    assert read_words_json(json.loads(json.dumps(words_to_json(words)))) == words


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        (7, "[0]"),
        ({"image": "a.jpg"}, "[0]"),
        ({"image": "a.jpg", "words": [3]}, "[0].words[0]"),
        ({"image": "a.jpg", "words": [{"text": "a"}]}, "[0].words[0]"),
        ({"image": "a.jpg", "words": [{"text": "a", "polygon": 5}]}, "[0].words[0].polygon"),
        ({"image": "a.jpg", "words": [{"text": "a", "polygon": [1, 2]}]}, "[0].words[0].polygon"),
        (
            {"image": "a.jpg", "words": [{"text": "a", "polygon": [], "source": "me"}]},
            "[0].words[0].source",
        ),
    ],
)
def test_words_of_another_form_are_refused_by_their_place(entry: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_words_json([entry])  # type: ignore[list-item]
    assert refused.value.field == field


# pycocotools is older than the NumPy rule it breaks.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_masks_are_what_pycocotools_reads(result: PictureResult) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    dataset = CocoDataset()
    dataset.add("a.png", result)
    file = json.loads(json.dumps(dataset.to_json()))
    assert [a["category_id"] for a in file["annotations"]] == [1, 1, 2, 2]
    assert [a["iscrowd"] for a in file["annotations"]] == [0, 0, 0, 1]
    for entry, mask in zip(file["annotations"], result.words[0].characters, strict=False):
        decoded = coco_mask.decode(entry["segmentation"])
        assert (decoded == mask.mask.paint(SIZE)).all()
        assert entry["attributes"]["char"] == mask.char
        assert entry["bbox"] == coco_mask.toBbox(entry["segmentation"]).tolist()


def test_refused_masks_stay_out_of_the_training_set_unless_asked_for(
    result: PictureResult,
) -> None:
    word = result.words[0]
    bad = character("o", 0, word.characters[0].mask, refused="low score: 0.1")
    words = (
        WordResult(
            annotation=word.annotation,
            characters=(bad, word.characters[1]),
            mask=word.mask,
            refused=bad.refused,
        ),
    )
    strict, lenient = CocoDataset(), CocoDataset()
    refused = PictureResult(size=SIZE, words=words)
    strict.add("a.png", refused)
    lenient.add("a.png", refused, refused=True)
    assert [a["attributes"].get("char") for a in strict.annotations] == ["i"]
    assert len(lenient.annotations) == 3
    assert lenient.annotations[0]["attributes"]["refused"] == "low score: 0.1"
    assert summarize([refused]).refused == {"low score": 1}


@pytest.mark.parametrize("window", [ring(), dotted(), np.ones((1, 1), bool)])
def test_an_outline_encloses_exactly_the_pixels_of_its_mask(window: np.ndarray) -> None:
    mask = PlacedMask(6, 7, window)
    points = np.array(single_outline(mask))[:, ::-1] - 0.5
    assert (polygon2mask(SIZE, points) == mask.paint(SIZE)).all()


def test_holes_and_parts_are_loops_of_their_own() -> None:
    assert len(outlines(PlacedMask(0, 0, ring()))) == 2
    assert len(outlines(PlacedMask(0, 0, dotted()))) == 2


def test_a_hole_with_more_corners_than_its_part_is_still_a_hole() -> None:
    rows, columns = np.mgrid[0:40, 0:40]
    plate = np.hypot(rows - 20, columns - 20) > 9
    word = WordResult(
        annotation=WordAnnotation(text="D", polygon=POLYGON), mask=PlacedMask(2, 0, plate)
    )
    (region,) = regions(PictureResult(size=SIZE, words=(word,)), shape="polygon")
    assert np.array(region["value"]["points"]).min() < 4  # percent: the plate's edge, not the hole


def test_yolo_polygons_come_back_as_masks(result: PictureResult) -> None:
    classes = yolo_classes([result])
    assert classes == ["i", "o"]
    for line, wanted in zip(yolo_lines(result, classes), result.words[0].characters, strict=True):
        number, *shares = line.split()
        points = np.array(shares, float).reshape(-1, 2) * (SIZE[1], SIZE[0])
        got = polygon2mask(SIZE, points[:, ::-1] - 0.5)
        assert classes[int(number)] == wanted.char
        assert (got == wanted.mask.paint(SIZE)).all()


def test_the_classes_of_yolo_are_read_by_yaml_whatever_they_are() -> None:
    yaml = pytest.importorskip("yaml")
    classes = ['"', "\\", "e\u0301", "👩\u200d👧", "😀", "a\x7f", "\x85", "no", "1", "#", "\n"]
    assert yaml.safe_load(yolo_yaml(classes))["names"] == dict(enumerate(classes))


@pytest.mark.parametrize(
    "polygon",
    [POLYGON, ((-9.5, 3.2), (30.0, -8.0), (70.0, 25.1), (-9.5, 12.0)), ((90.0, 90.0),) * 4],
)
def test_a_polygon_is_filled_in_its_window_alone(polygon: tuple[tuple[float, float], ...]) -> None:
    window, whole = placed_polygon(polygon, SIZE), polygon_mask(polygon, SIZE)
    assert (window.paint(SIZE) == whole).all()
    assert encode_placed(window, SIZE) == encode_mask(whole)
    decoded = decode_placed(str(encode_mask(whole)["counts"]), SIZE)
    assert (decoded.paint(SIZE) == whole).all()


def test_a_large_polygon_is_filled_in_bands_that_need_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gesso_core.annotate.char_sam.words._BAND_PIXELS", 3000)
    size, leaning = (200, 300), ((0.0, 0.0), (290.0, 11.0), (300.0, 200.0), (7.0, 190.0))
    tracemalloc.start()
    filled = polygon_mask(leaning, size)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (filled == polygon2mask(size, np.array(leaning)[:, ::-1] - 0.5)).all()
    assert most < 15 * filled.size  # at once, it would be ninety


def test_what_is_written_of_a_small_mask_does_not_grow_with_the_picture() -> None:
    huge = (60_000, 60_000)  # painted, 3.6 GB
    ignored = WordAnnotation(text="#", polygon=POLYGON, ignore=True)
    words = (WordResult(annotation=ignored, mask=placed_polygon(POLYGON, huge)),)
    data_set = CocoDataset()
    tracemalloc.start()
    data_set.add("a.png", PictureResult(size=huge, words=words))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data_set.annotations[0]["area"] == 40 * 25
    assert most < 30e6


def test_the_png_holds_one_value_per_character_and_the_json_says_which(
    result: PictureResult, tmp_path
) -> None:
    write_textseg(tmp_path, "a", np.zeros((*SIZE, 3), np.uint8), result)
    values = np.asarray(Image.open(tmp_path / "mask" / "a.png"))
    entries = json.loads((tmp_path / "annotation" / "a.json").read_text())
    for entry, wanted in zip(entries[0]["char"], result.words[0].characters, strict=True):
        assert (values == entry["mask_value"]).sum() == wanted.mask.area
    assert entries[1]["ignore"]
    assert textseg_json(result) == entries


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    name: str, result: PictureResult, tmp_path
) -> None:
    with pytest.raises(UnsafeFile, match="not a file name inside"):
        write_textseg(tmp_path / "set", name, np.zeros((*SIZE, 3), np.uint8), result)
    assert not any(tmp_path.rglob("*.png"))


def test_more_than_255_characters_need_16_bits(result: PictureResult) -> None:
    one = character("x", 0, PlacedMask(1, 1, np.ones((1, 1), bool)))
    last = character("y", 299, PlacedMask(3, 3, np.ones((1, 1), bool)))
    word = WordResult(
        annotation=result.words[0].annotation, characters=(one,) * 299 + (last,), mask=one.mask
    )
    many = PictureResult(size=SIZE, words=(word,))
    assert indexed_mask(many)[3, 3] == 300
    assert np.asarray(Image.open(io.BytesIO(indexed_png(many))))[3, 3] == 300


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_brush_strokes_come_back_as_masks(share: float) -> None:
    mask = np.random.default_rng(1).random((37, 211)) < share
    assert (unpack_brush(pack_brush(PlacedMask(0, 0, mask), SHEET), SHEET) == mask).all()


def test_a_brush_is_made_from_the_window_of_its_mask_alone() -> None:
    window = PlacedMask(30, 5, np.random.default_rng(2).random((9, 181)) < 0.5)
    whole = window.paint(SHEET)
    packed = pack_brush(window, SHEET)
    assert packed == pack_brush(PlacedMask(0, 0, whole), SHEET)
    assert (unpack_brush(packed, SHEET) == whole).all()


def test_long_runs_of_a_brush_are_split() -> None:
    mask = np.zeros((300, 400), bool)
    mask[200:] = True
    packed = pack_brush(PlacedMask(0, 0, mask), (300, 400))
    assert (unpack_brush(packed, (300, 400)) == mask).all()


def test_a_brush_of_another_picture_is_refused() -> None:
    packed = pack_brush(PlacedMask(1, 1, np.ones((2, 2), bool)), (4, 4))
    with pytest.raises(InvalidRequest, match="values"):
        unpack_brush(packed, (5, 4))
    with pytest.raises(InvalidRequest, match="ends before"):
        unpack_brush(packed[:-4], (4, 4))


def test_label_studio_regions_are_masks_or_polygons_in_percent(result: PictureResult) -> None:
    brushes = regions(result, shape="brush")
    assert [r["meta"]["text"] for r in brushes] == [["oi"], ["o"], ["i"]]
    got = unpack_brush(brushes[1]["value"]["rle"], SIZE)
    assert (got == result.words[0].characters[0].mask.paint(SIZE)).all()
    polygons = regions(result, shape="polygon")
    dots = [r for r in polygons if r["meta"]["text"] == ["i"]]
    assert len(dots) == 2
    for region in polygons:
        points = np.array(region["value"]["points"])
        assert ((points >= 0) & (points <= 100)).all()
        assert (region["original_width"], region["original_height"]) == (60, 40)
    assert len({r["id"] for r in polygons}) == len(polygons)


def test_a_label_studio_task_carries_one_prediction(result: PictureResult) -> None:
    made = task("s3://bucket/a.png", result)
    assert made["data"] == {"image": "s3://bucket/a.png"}
    assert made["predictions"][0]["score"] == 0.7
    json.dumps(made)
    inside = task("data:image/png;base64,AAAA", result, file_name="a.png")
    assert inside["data"]["file_name"] == "a.png"


def test_label_studio_is_told_why_a_mask_was_refused_and_gets_no_empty_brush() -> None:
    refused = character("o", 0, PlacedMask(6, 7, ring()), refused="low score: 0.1")
    nothing = character("i", 1, PlacedMask(0, 0, np.zeros((0, 0), bool)))
    word = WordResult(
        annotation=WordAnnotation(text="oi", polygon=POLYGON),
        characters=(refused, nothing),
        mask=refused.mask,
        score=0.1,
    )
    _, letter = regions(PictureResult(size=SIZE, words=(word,)), shape="brush")
    assert letter["meta"] == {"text": ["o"], "flags": [], "refused": "low score: 0.1"}
