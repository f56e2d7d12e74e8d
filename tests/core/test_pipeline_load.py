"""A model from its folder: parts that fit, defaults that follow from it, and clear refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, OutOfMemory, WeightsError
from gesso_core.pipelines.load import TEXT_STATS, load_denoiser
from gesso_core.pipelines.memory import explained
from gesso_core.pipelines.recipe import Canvas, GenerationRequest, make_recipe, model_size
from gesso_core.pipelines.tensor_bytes import pack_tensors, unpack_tensor
from gesso_core.registry import MODELS
from safetensors.torch import save_file


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy", symlinks=True))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_defaults_of_a_folder_follow_from_its_configuration(folder: Path) -> None:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 6.0}')
    entry = load_denoiser(folder, name="mine").entry
    assert (entry.name, entry.native_size, entry.shift) == ("mine", 64, 6.0)
    assert (entry.sampler, entry.steps) == ("flow-dpm-solver", 20)


def test_the_defaults_of_a_sprint_folder_are_those_of_a_few_step_model(
    tiny_sprint_pipeline: Path,
) -> None:
    entry = load_denoiser(tiny_sprint_pipeline).entry
    assert (entry.name, entry.sampler, entry.steps) == ("tiny-sprint", "scm", 2)


def test_the_revision_is_the_commit_that_was_pulled(folder: Path) -> None:
    (folder / "gesso_manifest.json").write_text(
        json.dumps({"format": 1, "commit": "c0ffee", "files": {}})
    )
    assert load_denoiser(folder).identity.revision == "c0ffee"


def test_text_statistics_beside_the_weights_are_applied(folder: Path) -> None:
    plain = load_denoiser(folder).text_encoder.encode(["a red apple"]).states_BLC[0, 0]
    mean, std = torch.full((576,), 0.5), torch.full((576,), 2.0)
    save_file({"mean": mean, "std": std}, folder / "transformer" / TEXT_STATS)
    adapted = load_denoiser(folder).text_encoder.encode(["a red apple"]).states_BLC[0, 0]
    torch.testing.assert_close(adapted, (plain - 0.5) / 2.0)


def test_an_autoencoder_with_other_latents_is_refused(folder: Path) -> None:
    edit(folder / "vae" / "config.json", latent_channels=16)
    with pytest.raises(WeightsError, match=r"latents of 8 channels.*decodes 16"):
        load_denoiser(folder)


def test_an_unknown_text_encoder_is_refused(folder: Path) -> None:
    (folder / "text_encoder").unlink()
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(WeightsError, match="type 't5'; known are 'gemma2'"):
        load_denoiser(folder)


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="diffusion_pytorch_model"):
        load_denoiser(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises((WeightsError, ConfigError), match=r"blocks\.2"):
        load_denoiser(folder)


@pytest.mark.parametrize(
    ("name", "wanted", "drawn"),
    [
        ("sana-0.6b-1024", (1024, 1024), (1024, 1024)),
        ("sana-0.6b-1024", (1080, 1920), (768, 1344)),
        ("sana-0.6b-512", (1000, 250), (1024, 256)),
        ("sana-1.6b-4k", (2160, 3840), (3072, 5376)),
    ],
)
def test_a_published_model_draws_at_its_nearest_bin(
    name: str, wanted: tuple[int, int], drawn: tuple[int, int]
) -> None:
    canvas = Canvas(compression=32, channels=32)
    assert model_size(MODELS[name], canvas, *wanted) == drawn


def test_a_recipe_has_the_latent_of_its_bin() -> None:
    entry, canvas = MODELS["sana-0.6b-1024"], Canvas(compression=32, channels=32)
    request = GenerationRequest(prompt="x", width=1920, height=1080)
    recipe = make_recipe(request, entry, canvas, guidance_embedding=False)
    assert recipe.latent_shape == (32, 24, 42)
    assert recipe.pixels == 768 * 1344


def test_a_model_without_a_table_keeps_the_proportions_at_its_own_area() -> None:
    entry = replace(MODELS["sana-tiny"], native_size=64, aspect_bins=None)
    canvas = Canvas(compression=16, channels=32)
    sizes = [(64, 64), (128, 128), (64, 96), (32, 128)]
    drawn = [model_size(entry, canvas, *size) for size in sizes]
    assert drawn == [(64, 64), (64, 64), (48, 80), (32, 128)]


def test_a_failed_allocation_is_explained() -> None:
    with (
        pytest.raises(OutOfMemory, match="a petabyte does not fit into memory; ask for less"),
        explained("a petabyte", "ask for less"),
    ):
        torch.empty(10**15)


def test_another_failure_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), explained("all", "nothing"):
        torch.zeros(2) + torch.zeros(3)


def test_tensors_survive_their_way_as_bytes() -> None:
    latent = torch.randn(8, 4, 4).to(torch.bfloat16).permute(0, 2, 1)
    assert torch.equal(unpack_tensor(pack_tensors({"latent": latent}), "latent"), latent)


@pytest.mark.parametrize("data", [b"", b"\x80\x04\x95pickle", b"\xff" * 64], ids=repr)
def test_bytes_that_are_no_tensors_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a safetensors file") as refusal:
        unpack_tensor(data, "latent")
    assert refusal.value.field == "latent"
