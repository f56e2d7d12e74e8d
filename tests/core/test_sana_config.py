"""Sana's configurations and parameter names, against the published ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, WeightsError
from gesso_core.models.keys.sana import SANA_ORIGINAL, sana_diffusers_keys, sana_keys
from gesso_core.models.keys.translate import translate, untranslate
from gesso_core.models.sana import SANA_CONFIGS, Sana, SanaConfig
from torch import Tensor

LAYOUTS = Path(__file__).parents[1] / "golden" / "key_layouts"
PUBLISHED = {
    "sana_600m": ("sana-0.6b-1024", 591.75),
    "sana_1600m": ("sana-1.6b-1024", 1604.46),
    "sana15_1600m": ("sana-1.5-1.6b", 1604.64),
    "sana15_4800m": ("sana-1.5-4.8b", 4721.83),
    "sana_sprint_600m": ("sana-sprint-0.6b", 593.50),
    "sana_sprint_1600m": ("sana-sprint-1.6b", 1610.24),
}

TINY = SanaConfig(
    width=64,
    depth=1,
    cross_heads=2,
    cross_head_dim=32,
    caption_channels=48,
    sample_size=4,
)


def published_names(layout: str) -> dict[str, list[int]]:
    names = json.loads((LAYOUTS / f"{layout}.json").read_text())
    found: dict[str, list[int]] = names.get("tensors", names)
    return found


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def meta_model(config: SanaConfig) -> Sana:
    with torch.device("meta"):
        return Sana(config)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_models(layout: str) -> None:
    name, _ = PUBLISHED[layout]
    config = SANA_CONFIGS[name]
    state = meta_model(config).state_dict()
    keys = sana_diffusers_keys(guidance_embedding=config.guidance_embedding)
    assert shapes(untranslate(state, keys)) == published_names(layout)
    assert shapes(untranslate(state, SANA_ORIGINAL)) == published_names(f"{layout}.original")


@pytest.mark.parametrize("suffix", ["", ".original"], ids=["diffusers", "original"])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_every_published_name_has_a_home(layout: str, suffix: str) -> None:
    names = published_names(layout + suffix)
    checkpoint = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    model = meta_model(SANA_CONFIGS[PUBLISHED[layout][0]])
    translated = translate(checkpoint, sana_keys(checkpoint), expected=model.state_dict())
    model.load_state_dict(translated, assign=True)


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    count = sum(parameter.numel() for parameter in meta_model(SANA_CONFIGS[name]).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_buffers_of_original_checkpoints_are_dropped() -> None:
    model = Sana(TINY)
    checkpoint = untranslate(model.state_dict(), SANA_ORIGINAL)
    checkpoint["pos_embed"] = torch.zeros(1, 16, 64)
    checkpoint["y_embedder.y_embedding"] = torch.zeros(300, 48)
    checkpoint["logvar_linear.weight"] = torch.zeros(1, 64)
    checkpoint["logvar_linear.bias"] = torch.zeros(1)
    translated = translate(checkpoint, sana_keys(checkpoint), expected=model.state_dict())
    assert translated.keys() == model.state_dict().keys()


def test_norms_of_queries_and_keys_are_never_dropped_silently() -> None:
    checkpoint = untranslate(Sana(replace(TINY, qk_norm=True)).state_dict(), SANA_ORIGINAL)
    plain = meta_model(TINY)
    with pytest.raises(WeightsError, match="q_norm"):
        translate(checkpoint, sana_keys(checkpoint), expected=plain.state_dict())


@pytest.mark.parametrize("name", SANA_CONFIGS)
def test_configurations_survive_the_way_through_diffusers(name: str) -> None:
    config = SANA_CONFIGS[name]
    assert SanaConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"cross_attention_dim": 99}, "cross_attention_dim"),
        ({"num_layers": 0}, "depth"),
        ({"num_layers": "20"}, "depth"),
        ({"patch_size": 3}, "patch_size"),
        ({"interpolation_scale": -1.0}, "interpolation_scale"),
        ({"mlp_ratio": 0.0}, "ffn_ratio"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SanaConfig.from_diffusers({**TINY.to_diffusers(), **change})


def test_an_incomplete_configuration_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        SanaConfig.from_diffusers({"num_attention_heads": 3, "attention_head_dim": 16})


def test_width_must_hold_whole_heads() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        replace(TINY, width=65)
