"""What every segmenter promises, asked of each: SAM, SAM 2, and the real MobileSAM pair."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.segmenter.contract import Embedding, Masks, Prompt, Segmenter
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.errors import InvalidRequest, UnknownModel, WeightsError
from safetensors.torch import load_file, save_file

HEIGHT, WIDTH = 48, 70
BOX = Prompt(box=(5, 5, 30, 30))
OTHER_BOX = Prompt(box=(9.5, 5, 60, 37))
POINT = Prompt(points=((40, 20),), labels=(1,))
RICH = Prompt(box=(5, 5, 30, 30), points=((12, 10), (40, 40)), labels=(1, 0))


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A light disc on a dark, slightly noisy ground."""
    rows, columns = np.mgrid[0:height, 0:width]
    disc = (rows - 18) ** 2 + (columns - 18) ** 2 < 144
    noise = np.random.default_rng(0).integers(0, 20, (height, width))
    return np.repeat((disc * 180 + noise)[..., None], 3, axis=2).astype(np.uint8)


@pytest.fixture(
    scope="module", params=["sam", "sam2", pytest.param("sam-mobile", marks=pytest.mark.slow)]
)
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    if request.param == "sam-mobile":
        loaded: Segmenter = request.getfixturevalue("sam_mobile")
        return loaded
    return load_segmenter(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture(scope="module")
def embedding(segmenter: Segmenter) -> Embedding:
    return segmenter.embed(picture())


def assert_same(a: Masks, b: Masks, row: int) -> None:
    """The only mask of ``a`` is mask ``row`` of ``b``."""
    np.testing.assert_allclose(a.low_res_PLL[0], b.low_res_PLL[row], atol=2e-3)
    np.testing.assert_allclose(a.predicted_iou_P[0], b.predicted_iou_P[row], atol=1e-4)


def test_every_prompt_gets_its_mask_in_order(segmenter: Segmenter, embedding: Embedding) -> None:
    prompts = [BOX, RICH, POINT, OTHER_BOX]
    together = segmenter.predict(embedding, prompts)
    assert together.masks_PHW.shape == (4, HEIGHT, WIDTH)
    assert together.candidates is None
    for row, prompt in enumerate(prompts):
        assert_same(segmenter.predict(embedding, [prompt]), together, row)


def test_the_same_question_gets_the_same_answer(segmenter: Segmenter, embedding: Embedding) -> None:
    first, second = (segmenter.predict(embedding, [BOX, RICH]) for _ in range(2))
    assert np.array_equal(first.low_res_PLL, second.low_res_PLL)
    again = segmenter.embed(picture())
    assert again.key == embedding.key
    assert np.array_equal(again.features_1CGG, embedding.features_1CGG)


def test_an_ambiguous_prompt_gets_the_best_proposal(
    segmenter: Segmenter, embedding: Embedding
) -> None:
    several = segmenter.predict(embedding, [BOX, POINT], multimask=True)
    found = several.candidates
    assert found is not None
    assert found.masks_PMHW.shape == (2, 3, HEIGHT, WIDTH)
    assert np.array_equal(found.best_P, found.predicted_iou_PM.argmax(axis=1))
    alone = segmenter.predict(embedding, [BOX, POINT])
    assert np.array_equal(alone.masks_PHW, several.masks_PHW)
    assert np.array_equal(alone.masks_PHW[0], found.masks_PMHW[0, found.best_P[0]])


def test_a_rich_prompt_gets_another_answer_than_the_best_proposal(
    segmenter: Segmenter, embedding: Embedding
) -> None:
    single = segmenter.predict(embedding, [RICH])
    several = segmenter.predict(embedding, [RICH], multimask=True)
    assert not np.allclose(single.low_res_PLL, several.low_res_PLL, atol=1e-3)


def test_a_former_mask_is_a_prompt(segmenter: Segmenter, embedding: Embedding) -> None:
    before = segmenter.predict(embedding, [BOX, OTHER_BOX])
    prompts = [replace(BOX, mask_LL=mask_LL) for mask_LL in before.low_res_PLL]
    after = segmenter.predict(embedding, [*prompts, Prompt(mask_LL=before.low_res_PLL[0])])
    assert not np.allclose(after.low_res_PLL[0], before.low_res_PLL[0], atol=1e-2)
    assert not np.allclose(after.low_res_PLL[0], after.low_res_PLL[1], atol=1e-2)
    assert_same(segmenter.predict(embedding, prompts[1:]), after, 1)


def test_no_prompts_give_no_masks(segmenter: Segmenter, embedding: Embedding) -> None:
    assert segmenter.predict(embedding, []).masks_PHW.shape == (0, HEIGHT, WIDTH)


def test_stability_lies_between_nothing_and_one(segmenter: Segmenter, embedding: Embedding) -> None:
    masks = segmenter.predict(embedding, [BOX, POINT, RICH], multimask=True)
    assert masks.candidates is not None
    stability = masks.candidates.stability_PM
    assert ((stability >= 0) & (stability <= 1)).all()


def test_an_embedding_of_another_model_is_refused(
    segmenter: Segmenter, embedding: Embedding
) -> None:
    foreign = replace(embedding, model="other", model_sha256="0" * 64)
    with pytest.raises(InvalidRequest, match="this embedding is of other"):
        segmenter.predict(foreign, [BOX])


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Prompt(box=(WIDTH, 5, WIDTH + 9, 30)), "box"),
        (Prompt(box=(-9, 5, -1, 30)), "box"),
        (Prompt(points=((10, HEIGHT + 1),), labels=(1,)), "points"),
        (Prompt(mask_LL=np.zeros((7, 7), np.float32)), "mask"),
    ],
)
def test_what_lies_outside_the_picture_is_refused_by_its_field(
    segmenter: Segmenter, embedding: Embedding, prompt: Prompt, field: str
) -> None:
    with pytest.raises(InvalidRequest, match="prompt 1") as refusal:
        segmenter.predict(embedding, [BOX, prompt])
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "empty prompt"),
        ({"box": (3, 3, 3, 9)}, "no area"),
        ({"box": (3, 3, float("nan"), 9)}, "finite"),
        ({"points": ((1, 2),)}, "1 points but 0 labels"),
        ({"points": ((1, 2),), "labels": (2,)}, "use 1 for the object"),
        ({"points": ((1, float("inf")),), "labels": (1,)}, "finite"),
        ({"mask_LL": np.full((4, 4), np.nan, np.float32)}, "finite logits"),
    ],
)
def test_a_prompt_that_makes_no_sense_cannot_be_made(fields: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Prompt(**fields)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_what_is_no_rgb_picture_is_refused(segmenter: Segmenter, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="expected uint8"):
        segmenter.embed(np.zeros(shape, np.uint8))


def test_a_side_longer_than_any_camera_makes_is_refused(segmenter: Segmenter) -> None:
    with pytest.raises(InvalidRequest, match="at most 65,535 pixels a side"):
        segmenter.embed(np.zeros((1, 65_536, 3), np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (130, 3)])
def test_pictures_of_extreme_shape_are_segmented(
    segmenter: Segmenter, size: tuple[int, int]
) -> None:
    height, width = size
    embedding = segmenter.embed(np.full((height, width, 3), 99, np.uint8))
    masks = segmenter.predict(embedding, [Prompt(box=(0, 0, width, height))])
    assert masks.masks_PHW.shape == (1, height, width)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_weights_must_fill_a_published_model(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / kind)
    weights = load_file(folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="iou_token"):
        load_segmenter(folder)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(WeightsError, match="'vit' model, expected one of: sam"):
        load_segmenter(tmp_path)


def test_missing_models_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="make models"):
        load_segmenter(store=tmp_path)
    with pytest.raises(WeightsError, match="hf download facebook/sam-vit-base"):
        load_segmenter("sam-vit-base", store=tmp_path)
    with pytest.raises(UnknownModel, match="sam-mobile"):
        load_segmenter("sam-vit-bose", store=tmp_path)
    with pytest.raises(WeightsError, match="is no segmenter"):
        load_segmenter(tmp_path)
