"""Small models that draw token by token, of random weights, as folders in the published layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from gesso_core.hub.load_hart_tokenizer import TokenizerParts
from gesso_core.hub.store import SHIPPED
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.transformer import HART
from gesso_core.models.keys.hart import HART_ORIGINAL
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.keys.vila_u import DEPTH_TRANSFORMER
from gesso_core.models.keys.vila_u_tower import DEPTH_PREFIX, tower_aliases, write_tower
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.train.vila_u_tokenizer import build_tokenizer, load_tokenizer
from safetensors.torch import save_file
from small_towers import small_tower
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = (
    "USER: what is this? ASSISTANT: a red apple on a blue table",
    "does this picture show a green pear? yes no",
    "describe the picture: a small yellow lemon",
)
TOWER = small_tower(size=64, patch=16, codes=3, entries=24)
DEPTH = DepthConfig(
    depth=3, codebook=24, code_width=32, state_width=48, width=32, heads=2, layers=2, dropout=0.0
)

HART_TOKENIZER = HARTTokenizerConfig(
    vocabulary=48, channels=8, scales=(1, 2, 3, 4), width=32, multipliers=(1, 1, 1, 1, 1)
)
HART_TRANSFORMER = HARTConfig(
    scales=(1, 2, 3, 4),
    vocabulary=48,
    latent_channels=8,
    context_tokens=20,
    context_channels=576,
    width=48,
    depth=2,
    heads=4,
    context_norm=True,
    diffusion_width=32,
    diffusion_depth=1,
)


def write_vila_u(folder: Path, *, frames: int = 2, context: int = 256) -> Path:
    """64 px, 4x4 positions of 3 codes, videos of ``frames`` frames (0: none)."""
    torch.manual_seed(11)
    build_tokenizer(WORDS, folder / "llm", entries=360)
    tokenizer = load_tokenizer(folder / "llm")
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    depth = {f"{DEPTH_PREFIX}{k}": v for k, v in untranslate(_depth(), DEPTH_TRANSFORMER).items()}
    _write(folder / "vision_tower", depth | _tower(), {
        "model_type": "rqvaesigliptransformer_model",
        "rqvaesiglip": TOWER.to_original(),
        "rqtransformer": DEPTH.to_original(TOWER.grid),
    })  # fmt: skip
    projector = Projector("mlp2x_gelu", TOWER.width, llama.hidden_size).state_dict()
    _write(folder / "mm_projector", projector, {"mm_projector_type": "mlp2x_gelu"})
    top = {
        "model_type": "vila_u_llama",
        "num_video_frames": frames,
        "mm_use_vi_start_end": frames > 0,
        "chat_template_gesso": {},
    }
    (folder / "config.json").write_text(json.dumps(top))
    return folder


def write_hart(folder: Path) -> Path:
    """64 px in four scales, with an autoencoder of its own; the text encoder is what ships."""
    torch.manual_seed(12)
    parts = TokenizerParts(HART_TOKENIZER)
    nn.init.normal_(parts.quantizer.codebook_VC)
    state = untranslate(parts.state_dict(), tokenizer_keys(HART_TOKENIZER.phi_sharing))
    _write(folder / "tokenizer", state, HART_TOKENIZER.to_original())
    model = HART(HART_TRANSFORMER)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    _write(
        folder / "llm",
        untranslate(model.state_dict(), HART_ORIGINAL),
        HART_TRANSFORMER.to_original(),
    )
    (folder / "text_encoder").symlink_to(SHIPPED / "smollm2-l6")
    return folder


def _tower() -> dict[str, Tensor]:
    state = write_tower(VisionTower(TOWER).state_dict(), TOWER)
    return {name: tensor for name, tensor in state.items() if name not in tower_aliases(TOWER)}


def _depth() -> dict[str, Tensor]:
    model = DepthTransformer(DEPTH)
    nn.init.normal_(model.position_1DE)
    return model.state_dict()


def _write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
