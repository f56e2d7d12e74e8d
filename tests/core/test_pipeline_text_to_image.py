"""From a prompt to a picture, through real files of random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import Cancelled, InvalidRequest, NumericalError, UnknownModel, WeightsError
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import Picture, PictureStep, TextToImage
from torch import nn

APPLE = GenerationRequest(prompt="a red apple", width=64, height=64, seed=7, steps=4)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> TextToImage:
    return TextToImage.load(tiny_pipeline)


@pytest.fixture(scope="module")
def sprint(tiny_sprint_pipeline: Path) -> TextToImage:
    return TextToImage.load(tiny_sprint_pipeline)


def difference(one: Picture, other: Picture) -> int:
    return int(np.abs(one.pixels_HWC.astype(int) - other.pixels_HWC.astype(int)).max())


def test_the_same_seed_gives_the_same_picture(pipeline: TextToImage) -> None:
    (first,), (second,) = pipeline(APPLE), pipeline(APPLE)
    assert np.array_equal(first.pixels_HWC, second.pixels_HWC)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a green pear"},
        {"negative_prompt": "shadows"},
        {"guidance_scale": 9.0},
        {"guidance_scale": 1.0},
        {"steps": 5},
        {"sampler": "flow-euler"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_wish_changes_the_picture(pipeline: TextToImage, change: dict[str, object]) -> None:
    plain, changed = pipeline(APPLE, replace(APPLE, **change))
    assert difference(plain, changed) > 0


def test_a_picture_is_the_same_alone_and_among_others_to_one_level(pipeline: TextToImage) -> None:
    requests = [
        replace(APPLE, seed=seed, prompt=prompt, steps=steps)
        for seed, prompt, steps in [
            (1, "a cat", 8),
            (2, "two small green pears on a very large white plate", 20),
            (3, "x", 5),
        ]
    ]
    together = pipeline(*requests)
    for request, picture in zip(requests, together, strict=True):
        assert difference(picture, pipeline(request)[0]) <= 1


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (100, 37), (37, 100), (127, 129), (33, 32), (16, 64)]
)
def test_a_picture_has_exactly_the_size_that_was_asked_for(
    pipeline: TextToImage, width: int, height: int
) -> None:
    (picture,) = pipeline(replace(APPLE, width=width, height=height, steps=1))
    assert picture.pixels_HWC.shape == (height, width, 3)


def test_every_step_is_told_and_can_be_seen(pipeline: TextToImage) -> None:
    steps: list[PictureStep] = []
    (picture,) = pipeline(APPLE, on_step=steps.append)
    assert [(step.request, step.index, step.total) for step in steps] == [
        (0, index, 4) for index in (1, 2, 3, 4)
    ]
    assert np.array_equal(steps[-1].preview(), picture.pixels_HWC)
    assert steps[0].preview().shape == (64, 64, 3)


def test_on_step_withdraws_a_picture(pipeline: TextToImage) -> None:
    seen: list[int] = []

    def stop_at_two(step: PictureStep) -> None:
        seen.append(step.index)
        if step.index == 2:
            raise Cancelled("job-1", after=step.index)

    with pytest.raises(Cancelled, match="after step 2"):
        pipeline(APPLE, on_step=stop_at_two)
    assert seen == [1, 2]


def test_a_picture_says_what_made_it(pipeline: TextToImage, tiny_pipeline: Path) -> None:
    (picture,) = pipeline(replace(APPLE, steps=None))
    made = picture.provenance
    assert (made.model, made.seed, made.sampler, made.steps) == ("tiny", 7, "flow-dpm-solver", 20)
    assert (made.guidance_scale, made.quantization, made.in_domain) == (4.5, "none", None)
    assert len(made.weights_sha256) == 64
    assert made.versions["torch"] == torch.__version__


def test_a_sprint_model_takes_two_steps_and_its_guidance_as_an_input(sprint: TextToImage) -> None:
    plain, guided = sprint(
        replace(APPLE, steps=None), replace(APPLE, steps=None, guidance_scale=9.0)
    )
    assert (plain.provenance.sampler, plain.provenance.steps) == ("scm", 2)
    assert difference(plain, guided) > 0


def test_a_sprint_picture_is_the_same_alone_and_among_others(sprint: TextToImage) -> None:
    requests = [replace(APPLE, seed=seed, steps=steps) for seed, steps in [(1, 2), (2, 4), (3, 1)]]
    for request, picture in zip(requests, sprint(*requests), strict=True):
        assert difference(picture, sprint(request)[0]) <= 1


@pytest.mark.parametrize(
    ("change", "complaint", "field"),
    [
        ({"prompt": " "}, "the prompt is empty", "prompt"),
        ({"sampler": "scm"}, "cannot use the sampler 'scm'; use flow-dpm-solver or", "sampler"),
        ({"sampler": "ddim"}, "'ddim'", "sampler"),
        ({"steps": 0}, "0 steps; flow-dpm-solver takes 1 to 100, 20 is usual", "steps"),
        ({"steps": 101}, "101 steps", "steps"),
        ({"guidance_scale": -1.0}, "guidance scale -1.0; allowed are 0 to 30", "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance scale nan", "guidance_scale"),
        ({"seed": -1}, "seed", "seed"),
        ({"seed": 2**63}, "seed", "seed"),
        ({"width": 8}, "width 8 is below 16 pixels", "width"),
        ({"width": 128, "height": 16}, "128x16 is longer than 4 to 1", "width"),
        ({"height": 512, "width": 512}, "512x512 is too large for tiny.*at most 128x128", "height"),
    ],
    ids=str,
)
def test_what_a_model_cannot_do_is_refused_with_the_field(
    pipeline: TextToImage, change: dict[str, object], complaint: str, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        pipeline(replace(APPLE, **change))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampler": "flow-euler"}, "sampler"),
        ({"steps": 21}, "steps"),
        ({"negative_prompt": "rain"}, "negative_prompt"),
    ],
)
def test_what_a_sprint_model_cannot_do_is_refused(
    sprint: TextToImage, change: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        sprint(replace(APPLE, **{"steps": 2} | change))
    assert refusal.value.field == field


def test_a_diverging_model_names_the_step(tiny_pipeline: Path) -> None:
    broken = TextToImage.load(tiny_pipeline)
    nn.init.constant_(broken.denoiser.model.patch.bias, float("inf"))
    with pytest.raises(NumericalError, match="NaN or infinite at step 1 of 4"):
        broken(APPLE)


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(UnknownModel, match=r"'sanna-tiny'.*did you mean 'sana-tiny'"):
        TextToImage.load("sanna-tiny")


def test_a_name_is_never_taken_for_a_path(tiny_pipeline: Path) -> None:
    with pytest.raises(UnknownModel):
        TextToImage.load(str(tiny_pipeline))


def test_an_autoencoder_is_no_text_to_image_model() -> None:
    with pytest.raises(WeightsError, match="dcae-tiny"):
        load_denoiser("dcae-tiny")


def test_half_a_pipeline_folder_says_what_is_missing(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tiny_pipeline / "transformer")
    with pytest.raises(WeightsError, match="no folder 'vae'"):
        TextToImage.load(tmp_path)


def test_bfloat16_gives_a_picture_of_the_same_kind(tiny_pipeline: Path) -> None:
    exact, rounded = (
        TextToImage.load(tiny_pipeline, dtype=dtype)(APPLE)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    error = np.abs(exact.pixels_HWC.astype(int) - rounded.pixels_HWC.astype(int)).mean()
    assert 0 < error < 8
