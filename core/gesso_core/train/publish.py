"""Write trained models as shipped weight folders: diffusers layout, float16, with their papers.

Every file states in its metadata what it is: model id, configuration, data lock, seed, trainer
revision and licence. A denoiser also names the autoencoder whose latents it was trained on.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.evaluate.references import save_references
from gesso_core.hub import weights_hash
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.keys.dc_ae import dc_ae_rules
from gesso_core.models.keys.sana import sana_diffusers_keys
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.sana import Sana
from gesso_core.text.domain import build_domain
from gesso_core.text.smollm2 import SmolLM2Encoder
from gesso_core.text.states import TextEncoder
from gesso_core.train.captions import filler_phrases
from gesso_core.train.compose import shrink, sprites_to_float
from gesso_core.train.concepts import Concept
from gesso_core.train.packages import LOCK_HASH
from gesso_core.train.sprites import SpriteSet

WEIGHTS = "diffusion_pytorch_model.safetensors"
HELD_OUT_SPRITES = "held_out_sprites.safetensors"
REFERENCES = "references.safetensors"
TEXT_STATS = "text_stats.safetensors"
LICENCE = "Apache-2.0; trained on MIT and Apache-2.0 artwork, see NOTICE"
SHIFT = 2.0
TOO_COMMON = 0.8  # cosine to a phrase without content, above which a word tells nothing


def publish_autoencoder(
    model: DCAE,
    latent_std: float,
    held_out: SpriteSet,
    folder: Path,
    *,
    size: int,
    about: Mapping[str, Any],
) -> None:
    """Write the autoencoder and the held-out sprites that its gates are measured on.

    Args:
        model: the trained autoencoder.
        latent_std: std of its latents; ``scaling_factor`` becomes its inverse.
        held_out: sprites never seen in training; about 60 of them are kept.
        folder: where to write.
        size: side in pixels at which the held-out sprites are kept.
        about: further entries of the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_diffusers() | {"scaling_factor": round(1 / latent_std, 6)}
    state = untranslate(model.state_dict(), dc_ae_rules("diffusers", model.config))
    _write(folder, "dcae-tiny", config, state, about)
    step = max(1, len(held_out.pixels_NHW4) // 60)
    small = shrink(sprites_to_float(held_out.pixels_NHW4[::step]), size)
    pixels = (small.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    save_file({"pixels": pixels.contiguous()}, folder / HELD_OUT_SPRITES)
    _make_readable(folder)


def publish_denoiser(
    model: Sana,
    text_stats: tuple[Tensor, Tensor],
    sprites: SpriteSet,
    captions: Sequence[str],
    folder: Path,
    *,
    autoencoder: Path,
    text_encoder: Path,
    about: Mapping[str, Any],
) -> None:
    """Write the denoiser with everything that belongs to it.

    Args:
        model: the trained denoiser.
        text_stats: mean and std per channel of the text states of its captions.
        sprites: sprites of its concepts, for the retrieval references.
        captions: a sample of its captions, from which the in-domain threshold is chosen.
        folder: where to write.
        autoencoder: published folder of the autoencoder whose latents it draws.
        text_encoder: folder of the text encoder.
        about: further entries of the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rules = sana_diffusers_keys(guidance_embedding=model.config.guidance_embedding)
    state = untranslate(model.state_dict(), rules)
    about = {**about, "autoencoder_sha256": weights_hash(autoencoder)}
    _write(folder, "sana-tiny", model.config.to_diffusers(), state, about)
    mean, std = text_stats
    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, folder / TEXT_STATS)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir(exist_ok=True)
    _write_json(
        scheduler,
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": SHIFT,
            "solver_order": 2,
        },
    )
    save_references(sprites, folder / REFERENCES)
    encoder = SmolLM2Encoder.from_folder(text_encoder, folder / TEXT_STATS)
    _write_domain(encoder, sprites.concepts, captions, folder)
    _make_readable(folder)


def _write(
    folder: Path,
    model_id: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    half = {name: tensor.detach().cpu().to(torch.float16) for name, tensor in state.items()}
    card = {
        "model": model_id,
        "parameters": sum(tensor.numel() for tensor in half.values()),
        "data_lock_sha256": LOCK_HASH,
        "trainer_revision": git_revision(),
        "license": LICENCE,
        **about,
    }
    metadata = {key: v if isinstance(v, str) else json.dumps(v) for key, v in card.items()}
    metadata |= {"config": json.dumps(config), "trained_dtype": "float32"}
    tensors = {name: tensor.contiguous() for name, tensor in half.items()}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    _write_json(folder / "config.json", config)
    _write_json(folder / "card.json", card)


def _write_domain(
    encoder: TextEncoder, concepts: Sequence[Concept], captions: Sequence[str], folder: Path
) -> None:
    """All trained names and words, less those that every prompt of the grammar resembles."""
    names = [concept.name for concept in concepts]
    words = [*dict.fromkeys([*names, *(word for c in concepts for word in c.keywords)])]
    fillers = filler_phrases()
    common_N = torch.stack(build_domain(encoder, words, fillers, folder).cosines(fillers)).amax(0)
    telling = [w for w, cosine in zip(words, common_N, strict=True) if cosine < TOO_COMMON]
    build_domain(encoder, telling, captions, folder)


def _make_readable(folder: Path) -> None:
    """Files for everybody to read; safetensors writes them for the owner only."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def git_revision() -> str:
    """The commit that the trainer runs from, if it can be told."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
