"""The annotation service behind a real broker: clicks, words, cars, and what may be missing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_contracts import annotations as a
from gesso_contracts import messages as m
from gesso_contracts import parse
from gesso_contracts.blobs import Inline
from gesso_contracts.jobs import JobProgress, JobState
from gesso_core.annotate.char_sam.ocr import WheelReader
from gesso_core.annotate.char_sam.pipeline import CharSam
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.kitti.calibration import parse_calibration
from gesso_core.annotate.kitti.labels import parse_labels
from gesso_core.annotate.masks import decode_mask
from gesso_core.annotate.segmenter.contract import Prompt, Segmenter
from gesso_core.annotate.segmenter.crops import segment
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.annotate.slf.prior import extent_of, load_prior
from gesso_core.annotate.slf.synthetic import synthetic_frames
from gesso_core.errors import InvalidRequest, UnknownModel, WeightsError
from gesso_core.pipelines.pictures import Pixels, blank_picture, decode_picture, encode_picture
from gesso_services.annotation_labels import mask_code, picture_result, placed_mask, text_labels
from gesso_services.annotation_workshop import AnnotationSettings, Workshop
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost, ServiceSpec

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Start = Callable[[ServiceSpec], Awaitable[ServiceHost]]
Build = Callable[..., ServiceSpec]
CALIBRATION = """P2: 720 0 610 44 0 720 175 0.2 0 0 1 0.003
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
"""


def png(pixels: Pixels) -> Inline:
    return Inline(data=encode_picture(pixels), media_type="image/png")


def noise(height: int = 60, width: int = 80, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
async def service(start_service: Start, annotation_spec: Build) -> ServiceHost:
    return await start_service(annotation_spec())


async def finished(
    store: JobStore, kind: str, request: a.AnnotateText | a.AnnotateCars
) -> JobState:
    state, _ = await store.submit("annotation", kind, request)
    return await wait_for(store, state.id, 60)


async def text_of(state: JobState, bus: Bus) -> tuple[a.TextAnnotated, a.TextLabels]:
    assert state.status == "succeeded", state.problem
    made = a.TextAnnotated.model_validate(state.result)
    return made, parse(await BlobStore(bus).get(made.labels), a.TextLabels)


@pytest.mark.usefixtures("service")
async def test_clicks_and_boxes_give_the_masks_of_the_core_and_the_second_look_is_remembered(
    gateway: Bus, tiny_sam: Path
) -> None:
    prompts = [
        a.PromptSpec(box=(10, 10, 50, 40)),
        a.PromptSpec(points=[(30, 30), (5, 5)], labels=[1, 0]),
    ]
    request = a.SegmentPrompts(model="sam-mobile", image=png(noise()), prompts=prompts)
    first = await call(gateway, "annotation", "segment", request, a.Segmented)
    second = await call(gateway, "annotation", "segment", request, a.Segmented)
    assert (first.cached, second.cached) == (False, True)
    assert first.masks == second.masks
    segmenter = load_segmenter(tiny_sam)
    expected = segmenter.predict(
        segmenter.embed(noise()),
        [
            Prompt(box=(10, 10, 50, 40)),
            Prompt(points=((30.0, 30.0), (5.0, 5.0)), labels=(1, 0)),
        ],
    )
    for got, mask in zip(first.masks, expected.masks_PHW, strict=True):
        size, counts = list(got.mask.size), got.mask.counts
        np.testing.assert_array_equal(decode_mask({"size": size, "counts": counts}), mask)
        assert got.area == mask.sum()


@pytest.mark.usefixtures("service")
async def test_a_small_box_is_looked_at_through_a_window_that_is_remembered(
    gateway: Bus, tiny_sam: Path
) -> None:
    picture, box = noise(200, 300), (120.0, 70.0, 152.0, 102.0)
    request = a.SegmentPrompts(
        model="sam-mobile", image=png(picture), prompts=[a.PromptSpec(box=box)]
    )
    first = await call(gateway, "annotation", "segment", request, a.Segmented)
    nearer = a.PromptSpec(box=box, points=[(130, 80)], labels=[1])
    again = request.model_copy(update={"prompts": [nearer]})
    second = await call(gateway, "annotation", "segment", again, a.Segmented)
    assert (first.cached, second.cached) == (False, True)
    ((_, expected),) = segment(load_segmenter(tiny_sam), picture, [Prompt(box=box)])
    counts = first.masks[0].mask.counts
    mask = decode_mask({"size": [200, 300], "counts": counts})
    np.testing.assert_array_equal(mask, expected.masks_PHW[0])
    assert not mask[:, :104].any()  # nothing outside the window


@pytest.mark.usefixtures("service")
async def test_a_click_beside_the_picture_is_refused_with_its_field(gateway: Bus) -> None:
    beside = a.PromptSpec(points=[(500, 5)], labels=[1])
    request = a.SegmentPrompts(model="sam-mobile", image=png(noise()), prompts=[beside])
    with pytest.raises(InvalidRequest, match="lies outside the 80x60 picture") as caught:
        await call(gateway, "annotation", "segment", request, a.Segmented)
    assert caught.value.field == "points"
    other = request.model_copy(update={"model": "sam-vit-huge"})
    with pytest.raises(UnknownModel, match="available: sam-mobile"):
        await call(gateway, "annotation", "segment", other, a.Segmented)


@pytest.mark.usefixtures("service")
async def test_words_become_the_characters_of_the_core_with_labels_and_a_picture(
    store: JobStore, gateway: Bus, tiny_sam: Path
) -> None:
    scene = make_scene(1000, words=1)
    words = [
        a.WordSpec(text=word.text, polygon=list(word.polygon), script=word.script)
        for word in scene.words
    ]
    unread = a.WordSpec(text="###", polygon=[(2, 2), (30, 2), (30, 20), (2, 20)], ignore=True)
    picture = scene.picture_HW3
    request = a.AnnotateText(
        model="char-sam", image=png(picture), name="sign.png", words=[*words, unread]
    )
    async with follow(store, "words", new=True) as events:
        await store.submit("annotation", "annotate-text", request, job_id="words")
        steps = [(e.step, e.total_steps) async for e in events if isinstance(e, JobProgress)]
    assert steps == [(number, 2) for number in range(3)]
    made, labels = await text_of(await store.get("words"), gateway)
    expected = CharSam(load_segmenter(tiny_sam)).annotate(picture, scene.words)
    assert text_labels(expected).words == labels.words[:1]
    assert labels.words[1].ignore
    assert not labels.words[1].characters
    assert (made.name, made.transcription, made.summary.words) == ("sign.png", "given", 2)
    assert (made.summary.ignored, made.provenance.segmenter) == (1, "sam-tiny")
    blobs = BlobStore(gateway)
    assert decode_picture(await blobs.get(made.overlay)).shape == picture.shape
    np.testing.assert_array_equal(decode_picture(await blobs.get(made.image)), picture)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"words": None}, "words", r"no reader to find them.*gesso\[ocr\]"),
        ({"words": [((200, 5), (240, 5), (240, 20), (200, 20))]}, "words.1.polygon", "outside"),
        ({"words": [((5, 5), (6, 5), (6, 6), (5, 6))]}, "words.1.polygon", "at least 2x2"),
        ({"image": Inline(data=b"no picture", media_type="image/png")}, "image", "not a whole"),
        ({"model": "char-sun"}, "model", "available: char-sam"),
    ],
)
async def test_words_that_cannot_be_annotated_fail_by_their_field(
    store: JobStore, changes: dict[str, object], field: str, sentence: str
) -> None:
    good = [(5, 5), (60, 5), (60, 25), (5, 25)]
    given: dict[str, object] = {"model": "char-sam", "image": png(noise()), "words": []}
    given |= changes
    if given["words"] is not None:
        polygons = [good, *given["words"]]  # type: ignore[misc]
        given["words"] = [a.WordSpec(text="ab", polygon=polygon) for polygon in polygons]
    state = await finished(store, "annotate-text", a.AnnotateText.model_validate(given))
    assert state.problem is not None
    assert state.problem.field == field
    with pytest.raises(InvalidRequest, match=sentence):
        raise InvalidRequest(state.problem.detail)


@pytest.mark.slow
async def test_without_words_the_reader_finds_them_and_an_empty_picture_has_none(
    start_service: Start, annotation_spec: Build, store: JobStore, gateway: Bus
) -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install gesso[ocr]")
    await start_service(annotation_spec(reader=True))
    scene = make_scene(1003, words=1)
    request = a.AnnotateText(model="char-sam", image=png(scene.picture_HW3))
    made, labels = await text_of(await finished(store, "annotate-text", request), gateway)
    found = WheelReader().find(scene.picture_HW3)
    assert [word.text for word in labels.words] == [word.text for word in found]
    assert {word.source for word in labels.words} <= {"ocr"}
    empty = a.AnnotateText(model="char-sam", image=png(blank_picture(64, 96)))
    made, labels = await text_of(await finished(store, "annotate-text", empty), gateway)
    assert (made.transcription, made.summary.words, labels.words) == ("ocr", 0, [])


@pytest.mark.usefixtures("service")
async def test_cars_become_label_lines_drawings_and_surfaces(store: JobStore, gateway: Bus) -> None:
    (frame,) = synthetic_frames(1)
    points = frame.scene.points_velo_N4
    assert points is not None
    scan = Inline(data=points.astype("<f4").tobytes(), media_type="application/octet-stream")
    boxes = [item.box for item in frame.scene.objects[:2]]
    request = a.AnnotateCars(
        model="slf-cars",
        image=png(blank_picture(375, 1242)),
        name="000000.png",
        calibration=CALIBRATION,
        points=scan,
        prompts=[a.CarPrompt(box=box) for box in boxes],
        meshes=True,
        occupancy=0.5,
    )
    state = await finished(store, "annotate-cars", request)
    assert state.status == "succeeded", state.problem
    made, blobs = a.CarsAnnotated.model_validate(state.result), BlobStore(gateway)
    labels = parse(await blobs.get(made.labels), a.CarLabels)
    assert [one.index for one in labels.objects] == [0, 1]
    cars = [one.car for one in labels.objects if one.car is not None]
    assert made.cars == len(cars) > 0
    assert made.cars + sum(made.refused.values()) == 2
    lines = parse_labels(made.kitti)
    assert [line.score for line in lines] == [round(car.score, 4) for car in cars]
    assert decode_picture(await blobs.get(made.overlay)).shape == (375, 1242, 3)
    assert decode_picture(await blobs.get(made.birds_eye)).shape == (600, 500, 3)
    assert made.meshes is not None
    assert (await blobs.get(made.meshes)).startswith(b"glTF")
    assert made.occupancy is not None
    assert (await blobs.get(made.occupancy)).startswith(b"ply")
    again, given = parse_calibration(labels.calibration), parse_calibration(CALIBRATION)
    np.testing.assert_array_equal(again.projection, given.projection)
    np.testing.assert_array_equal(again.velo_to_cam, given.velo_to_cam)
    shape = load_prior().grid(torch.tensor([cars[0].code]))
    assert extent_of(shape).size == pytest.approx(cars[0].size, abs=1e-4)
    assert cars[0].pose[3] == pytest.approx(cars[0].rotation_y)
    assert (state.step, state.total_steps) == (4, 4)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"calibration": "P2: 1 2 3"}, "calibration", "R0_rect is missing"),
        ({"points": Inline(data=b"12345", media_type="a/b")}, "points", "no whole number"),
        ({"prompts": [a.CarPrompt(box=(200, 5, 240, 30))]}, "box", "outside the 80x60"),
    ],
)
async def test_cars_that_cannot_be_annotated_fail_by_their_field(
    store: JobStore, changes: dict[str, object], field: str, sentence: str
) -> None:
    given = {
        "model": "slf-cars",
        "image": png(noise()),
        "calibration": CALIBRATION,
        "prompts": [a.CarPrompt(box=(5, 5, 40, 30))],
    }
    request = a.AnnotateCars.model_validate(given | changes)
    state = await finished(store, "annotate-cars", request)
    assert state.problem is not None
    assert (state.problem.field, sentence in state.problem.detail) == (field, True)


async def test_a_car_without_a_scan_is_flagged_as_a_guess(
    start_service: Start, annotation_spec: Build, store: JobStore, gateway: Bus
) -> None:
    await start_service(annotation_spec())
    request = a.AnnotateCars(
        model="slf-cars",
        image=png(blank_picture(375, 1242)),
        calibration=CALIBRATION,
        prompts=[a.CarPrompt(box=(500, 150, 700, 260))],
    )
    state = await finished(store, "annotate-cars", request)
    made = a.CarsAnnotated.model_validate(state.result)
    assert made.cars == 0 or made.flagged["image_only"] == 1


async def test_without_its_files_the_service_starts_says_so_and_works_once_they_are_there(
    start_service: Start, annotation_spec: Build, store: JobStore, gateway: Bus, tmp_path: Path
) -> None:
    from small_segmenter import write_segmenter

    await start_service(annotation_spec(folder=None, segmenter="sam-vit-base", store=tmp_path))
    ready = await call(gateway, "annotation", "ready", m.AskReady(), m.ServiceReady)
    assert ready.ready
    assert ready.models == ["char-sam", "slf-cars", "sam-vit-base"]
    assert set(ready.missing) == set(ready.models)
    assert "sam-vit-base is not on this machine; fetch it with" in ready.missing["char-sam"]
    request = a.AnnotateText(model="char-sam", image=png(noise()), words=[])
    state = await finished(store, "annotate-text", request)
    assert state.problem is not None
    assert (state.problem.code, state.status) == ("invalid_weights", "failed")
    assert "fetch it with" in state.problem.detail
    write_segmenter(tmp_path / "sam-vit-base")
    assert (await finished(store, "annotate-text", request)).status == "succeeded"
    ready = await call(gateway, "annotation", "ready", m.AskReady(), m.ServiceReady)
    assert (ready.missing, ready.in_use["sam-vit-base"].tasks) == ({}, ["segmentation"])
    assert ready.in_use["sam-vit-base"].weight_bytes > 10_000


async def test_files_that_arrive_are_noticed_by_asking_alone(
    start_service: Start, annotation_spec: Build, gateway: Bus, tmp_path: Path
) -> None:
    from small_segmenter import write_segmenter

    await start_service(annotation_spec(folder=None, segmenter="sam-vit-base", store=tmp_path))
    write_segmenter(tmp_path / "sam-vit-base")
    async with asyncio.timeout(10):
        while (await call(gateway, "annotation", "ready", m.AskReady(), m.ServiceReady)).missing:
            await asyncio.sleep(0.05)


async def test_however_often_one_asks_there_is_one_look_for_missing_files_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(AnnotationSettings.for_service("annotation", store=tmp_path))
    looks, gate = [], threading.Event()

    def slow() -> Segmenter:
        looks.append(gate.wait(5))
        raise WeightsError("not there yet")

    monkeypatch.setattr(shop, "_load", slow)
    for _ in range(50):
        shop.missing()
    gate.set()
    await shop.for_click(lambda: None)
    shop.close()
    assert looks == [True]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 60)])
def test_masks_travel_as_the_run_lengths_of_the_whole_picture(size: tuple[int, int]) -> None:
    from gesso_core.annotate.char_sam.words import PlacedMask
    from gesso_core.annotate.masks import box_of_mask, encode_mask

    generator = np.random.default_rng(3)
    for share in (0.0, 0.02, 0.5, 1.0):
        whole = generator.random(size) < share
        x0, y0, x1, y1 = box_of_mask(whole)
        placed = PlacedMask(x0, y0, whole[y0:y1, x0:x1])
        code = mask_code(placed, size)
        assert code.counts == encode_mask(whole)["counts"]
        back = placed_mask(code)
        np.testing.assert_array_equal(back.paint(size), whole)
        assert back.window_hw.shape == placed.window_hw.shape


def test_labels_come_back_as_the_result_that_they_were_made_from(tiny_sam: Path) -> None:
    scene = make_scene(1001, words=1)
    result = CharSam(load_segmenter(tiny_sam)).annotate(scene.picture_HW3, scene.words)
    back = picture_result(text_labels(result))
    assert text_labels(back) == text_labels(result)
    np.testing.assert_array_equal(back.mask(), result.mask())


def test_damaged_run_lengths_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="a 3x2 mask has 6"):
        placed_mask(a.MaskCode(size=(2, 3), counts="04"))
