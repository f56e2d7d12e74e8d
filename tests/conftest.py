"""Fixtures for every test: complete text-to-image models of random weights, as files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.hub.store import SHIPPED
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_config import DCAEConfig, Stage
from gesso_core.models.keys.dc_ae import diffusers_rules
from gesso_core.models.keys.sana import sana_diffusers_keys
from gesso_core.models.keys.translate import KeyMap, untranslate
from gesso_core.models.sana import Sana, initialize_weights
from gesso_core.models.sana_config import SanaConfig
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
