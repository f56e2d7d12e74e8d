"""LoRAs by request through the pipeline: pictures, groups, provenance, and files that change."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import InvalidRequest, WeightsError
from gesso_core.lora.library import LoraUse
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from safetensors.torch import save_file

APPLE = GenerationRequest(prompt="a red apple", width=64, height=64, seed=7, steps=4)
LAYERS = {  # of the tiny pipeline: (outputs, inputs)
    "transformer_blocks.0.attn1.to_v": (64, 64),
    "transformer_blocks.1.attn2.to_k": (64, 64),  # counts when the text is encoded, not after
    "transformer_blocks.1.ff.conv_inverted": (320, 64),
    "proj_out": (8, 64),
}


def write_lora(path: Path, seed: int, layers: Mapping[str, tuple[int, int]] = LAYERS) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, (outputs, inputs) in layers.items():
        down, up = (torch.randn(s, generator=generator) for s in ((4, inputs), (outputs, 4)))
        factors[f"transformer.{layer}.lora_A.weight"] = down / inputs**0.5
        factors[f"transformer.{layer}.lora_B.weight"] = up
    save_file(factors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("ink", "oil")):
        write_lora(tmp_path / f"{name}.safetensors", seed)
    return tmp_path


@pytest.fixture
def pipeline(tiny_pipeline: Path, folder: Path) -> TextToImage:
    return TextToImage.load(tiny_pipeline, lora_folder=folder)


def asking(*uses: tuple[str, float], **changes: object) -> GenerationRequest:
    loras = tuple(LoraUse(name=name, strength=strength) for name, strength in uses)
    return replace(APPLE, loras=loras, **changes)  # type: ignore[arg-type]


def far(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_every_strength_and_every_lora_makes_its_own_picture(pipeline: TextToImage) -> None:
    wishes = [
        asking(),
        asking(("ink", 1.0)),
        asking(("ink", 0.5)),
        asking(("ink", -1.0)),
        asking(("oil", 1.0)),
        asking(("ink", 1.0), ("oil", 1.0)),
    ]
    pixels = [pipeline(wish)[0].pixels_HWC for wish in wishes]
    for index, one in enumerate(pixels):
        for other in pixels[index + 1 :]:
            assert far(one, other) > 2
    assert np.array_equal(pipeline(asking())[0].pixels_HWC, pixels[0])


def test_pictures_with_other_loras_do_not_change_each_other(pipeline: TextToImage) -> None:
    wishes = [
        asking(),
        asking(("ink", 1.0)),
        asking(("oil", 0.5), seed=8, steps=6),
        asking(("ink", 1.0), prompt="a green pear", seed=9),
        asking(("ink", 0.5)),
    ]
    together = pipeline(*wishes)
    for wish, picture in zip(wishes, together, strict=True):
        assert far(picture.pixels_HWC, pipeline(wish)[0].pixels_HWC) <= 1


def test_groups_are_equal_where_the_numbers_are(pipeline: TextToImage, folder: Path) -> None:
    def group(*uses: tuple[str, float]) -> object:
        denoiser = pipeline.denoiser
        return denoiser.begin(denoiser.recipe(asking(*uses))).group

    ink = group(("ink", 1.0))
    assert ink == group(("ink", 1.0))
    (folder / "copy.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    assert group(("copy", 1.0)) == ink
    others = [group(), group(("ink", 0.9)), group(("oil", 1.0)), group(("ink", 1.0), ("oil", 1.0))]
    assert len({ink, *others}) == 5
    assert group(("ink", 0.0)) == group()
    write_lora(folder / "ink.safetensors", 5)
    assert group(("ink", 1.0)) != ink


def test_strength_0_is_the_picture_without(pipeline: TextToImage) -> None:
    plain, nothing = pipeline(asking(), asking(("ink", 0.0)))
    assert np.array_equal(plain.pixels_HWC, nothing.pixels_HWC)


def test_provenance_has_the_bytes_that_were_used(pipeline: TextToImage, folder: Path) -> None:
    before = sha256((folder / "ink.safetensors").read_bytes()).hexdigest()
    denoiser = pipeline.denoiser
    draft = denoiser.begin(denoiser.recipe(asking(("ink", 0.5))))
    write_lora(folder / "ink.safetensors", 5)
    (then,) = draft.loras.uses if draft.loras else ()
    assert (then.name, then.strength, then.sha256) == ("ink", 0.5, before)
    (now,) = pipeline(asking(("ink", 0.5)))[0].provenance.loras
    assert now.sha256 == sha256((folder / "ink.safetensors").read_bytes()).hexdigest() != before
    assert pipeline(asking())[0].provenance.loras == ()


def test_a_picture_keeps_the_file_it_began_with(pipeline: TextToImage, folder: Path) -> None:
    (want,) = pipeline(asking(("ink", 1.0)))
    replaced: list[int] = []

    def replace_file(step: object) -> None:
        if not replaced:
            write_lora(folder / "ink.safetensors", 5)
            replaced.append(1)

    (got,) = pipeline(asking(("ink", 1.0)), on_step=replace_file)
    assert np.array_equal(got.pixels_HWC, want.pixels_HWC)
    assert far(pipeline(asking(("ink", 1.0)))[0].pixels_HWC, want.pixels_HWC) > 2


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ([("pastel", 1.0)], "there is no LoRA 'pastel'; available: ink, oil"),
        ([("ink", 4.5)], "strength 4.5 of the LoRA 'ink'; allowed are -4 to 4"),
        ([("ink", float("nan"))], "strength nan"),
        ([("ink", 1.0), ("ink", 0.5)], "each once"),
        ([(name, 1.0) for name in "abcde"], "at most 4"),
    ],
    ids=["unknown", "strong", "nan", "twice", "five"],
)
def test_wishes_that_cannot_be_are_refused_at_the_door(
    pipeline: TextToImage, uses: list[tuple[str, float]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        pipeline(asking(*uses))
    assert caught.value.field == "loras"


def test_without_a_folder_there_are_no_loras(tiny_pipeline: Path) -> None:
    with pytest.raises(InvalidRequest, match="without a folder of LoRAs") as caught:
        TextToImage.load(tiny_pipeline)(asking(("ink", 1.0)))
    assert caught.value.field == "loras"


def test_a_file_for_another_model_is_refused(pipeline: TextToImage, folder: Path) -> None:
    write_lora(folder / "ink.safetensors", 0, {"transformer_blocks.2.attn1.to_q": (64, 64)})
    with pytest.raises(WeightsError, match=r"'transformer_blocks\.2\.attn1\.to_q'.*other model"):
        pipeline(asking(("ink", 1.0)))


def test_a_model_with_guidance_as_an_input_takes_loras_too(
    tiny_sprint_pipeline: Path, folder: Path
) -> None:
    write_lora(
        folder / "ink.safetensors", 0, LAYERS | {"time_embed.timestep_embedder.linear_1": (64, 256)}
    )
    pipeline = TextToImage.load(tiny_sprint_pipeline, lora_folder=folder)
    plain, inked = pipeline(asking(steps=2), asking(("ink", 1.0), steps=2))
    assert far(plain.pixels_HWC, inked.pixels_HWC) > 2
