"""Fixtures for every test: complete text-to-image models of random weights, as files."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.hub import load_sana, weights_hash
from gesso_core.hub.store import SHIPPED
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_config import DCAEConfig, Stage
from gesso_core.models.keys.dc_ae import diffusers_rules
from gesso_core.models.keys.sana import sana_diffusers_keys
from gesso_core.models.keys.translate import KeyMap, untranslate
from gesso_core.models.sana import Sana, initialize_weights
from gesso_core.models.sana_config import SanaConfig
from gesso_core.quant.canonical import CANONICAL_FILE, QuantizedModel, write_canonical
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.layer_map import find_layers, layer_map, matrix_of
from safetensors.torch import save_file
from torch import Tensor, nn

torch.set_num_threads(1)  # models this small only wait for a second thread

SANA = SanaConfig(
    width=64,
    depth=2,
    cross_heads=2,
    cross_head_dim=32,
    caption_channels=576,
    sample_size=4,
    in_channels=8,
    out_channels=8,
    interpolation_scale=1.0,
    qk_norm=True,
)
STAGES = tuple(Stage(width=width, depth=1) for width in (8, 16, 16, 32, 32))
DC_AE = DCAEConfig(
    latent_channels=8,
    encoder=(replace(STAGES[0], depth=0), *STAGES[1:]),
    decoder=(replace(STAGES[0], depth=0), *STAGES[1:]),
    scaling_factor=0.5,
)


def write_model(folder: Path, model: nn.Module, config: Mapping[str, object], keys: KeyMap) -> None:
    folder.mkdir(parents=True)
    state: dict[str, Tensor] = untranslate(model.state_dict(), keys)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def write_pipeline(folder: Path, sana: SanaConfig) -> Path:
    """Transformer and autoencoder of random weights; the text encoder is the one that ships."""
    torch.manual_seed(0)
    transformer, autoencoder = Sana(sana), DCAE(DC_AE)
    initialize_weights(transformer, torch.Generator().manual_seed(0))
    # At their start values text hardly counts, and guidance as an input not at all.
    nn.init.ones_(transformer.caption.norm.weight)
    if transformer.guidance is not None:
        nn.init.normal_(transformer.guidance.out.weight, std=0.1)
    keys = sana_diffusers_keys(guidance_embedding=sana.guidance_embedding)
    write_model(folder / "transformer", transformer, sana.to_diffusers(), keys)
    write_model(folder / "vae", autoencoder, DC_AE.to_diffusers(), diffusers_rules())
    (folder / "text_encoder").symlink_to(SHIPPED / "smollm2-l6")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder: 64 px, f16 latents of 8 channels, two blocks."""
    return write_pipeline(tmp_path_factory.mktemp("models") / "tiny", SANA)


@pytest.fixture(scope="session")
def tiny_sprint_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a few-step model with the guidance as an input."""
    sprint = replace(SANA, guidance_embedding=True)
    return write_pipeline(tmp_path_factory.mktemp("models") / "tiny-sprint", sprint)


def write_quantized(pipeline: Path, folder: Path) -> Path:
    """The pipeline with an INT4 transformer, calibrated on the forward of random latents."""
    model = load_sana(pipeline / "transformer")
    rules = find_layers(model, layer_map("sana"))
    inputs = layer_inputs(model, list(rules))
    layers = {}
    for name, rule in rules.items():
        activation = "16bit" if rule.activation == "16bit" else "int4"
        options = QuantOptions(activation=activation, rank=8, grids=2, iterations=1)
        weight, bias = matrix_of(model.get_submodule(name), name)
        layers[name], _ = quantize_linear(weight, bias, inputs[name], options)
    plain = {
        key: tensor.bfloat16()
        for key, tensor in model.state_dict().items()
        if key.rpartition(".")[0] not in layers
    }
    made_by = {
        "model": pipeline.name,
        "trained_dtype": "bfloat16",
        "autoencoder_sha256": weights_hash(pipeline / "vae"),
    }
    write_canonical(
        folder / "transformer" / CANONICAL_FILE,
        QuantizedModel(layers=layers, plain=plain, made_by=made_by),
    )
    shutil.copy(pipeline / "transformer" / "config.json", folder / "transformer")
    for part in ("vae", "text_encoder"):
        (folder / part).symlink_to(pipeline / part)
    return folder


@torch.no_grad()
def layer_inputs(model: Sana, names: list[str]) -> dict[str, Tensor]:
    """What each layer reads, (M, K), in one forward on random latents and texts."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.update({name: args[0].flatten(0, -2)})

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    generator = torch.Generator().manual_seed(1)
    config = model.config
    side, channels = config.sample_size, config.in_channels
    latent = torch.randn(8, channels, side, side, generator=generator)
    text = torch.randn(8, 6, config.caption_channels, generator=generator)
    model(latent, torch.linspace(50, 950, 8), text)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="session")
def quantized_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipeline` with its transformer in 4 bit."""
    return write_quantized(tiny_pipeline, tmp_path_factory.mktemp("models") / "tiny-int4")
