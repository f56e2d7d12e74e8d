"""Write the small HART as a shipped weight folder in the published layout.

``llm`` and ``tokenizer`` are what HART's authors publish. Beside them, ``config.json`` says what
belongs to the model and lies elsewhere, and how it is best drawn from.
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.hub import resolve, weights_hash
from gesso_core.hub.load_hart import TRANSFORMER
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.transformer import HART
from gesso_core.models.keys.hart import HART_ORIGINAL
from gesso_core.models.keys.translate import untranslate
from gesso_core.safe_files import read_tensors
from gesso_core.train.hart import HART_TRAINING, SEED, hart_config, hart_data
from gesso_core.train.hart_tokenizer import FOLDER, load_trained_quantizer, publish_hart_tokenizer
from gesso_core.train.packages import LOCK_HASH
from gesso_core.train.publish import LICENCE, TEXT_STATS, git_revision
from gesso_core.train.run_state import load_averaged, read_counters
from gesso_core.train.stages import TEXT_ENCODER, Workspace

BASE: Final = "sana-tiny"  # from the same captions: text statistics and known things are its own
WEIGHTS: Final = "model.safetensors"
# Found on held-in prompts; see the gates beside the weights.
DRAWING: Final[dict[str, Any]] = {
    "guidance_scale": 2.0,
    "top_k": 5,
    "top_p": 0.0,
    "smooth": False,
    "temperature": 0.6,
}


def run_publish_hart(workspace: Workspace) -> None:
    """Write ``weights/hart-tiny`` from the newest saved states."""
    folder = workspace.weights / "hart-tiny"
    state = workspace.run / FOLDER / "transformer" / "state.safetensors"
    training = HART_TRAINING[workspace.profile.name]
    model = HART(hart_config(training, load_trained_quantizer(workspace)))
    load_averaged(model, state)
    publish_hart_tokenizer(workspace, folder / "tokenizer")
    counters = read_counters(state)
    about = {
        "seed": SEED,
        "concepts": len(workspace.drawn_sprites().concepts),
        "updates": counters["step"],
        "samples": counters["samples"],
        "wall_seconds": round(counters["used_s"]),
        "tokenizer_sha256": weights_hash(folder / "tokenizer"),
    }
    write_transformer(model, folder / TRANSFORMER, about)
    card = {
        "model": "hart-tiny",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data_lock_sha256": LOCK_HASH,
        "trainer_revision": git_revision(),
        "license": LICENCE,
        **about,
    }
    links = {"_class_name": "HART", "text_encoder": TEXT_ENCODER}
    links |= _text_statistics(workspace, folder)
    _write_json(folder / "config.json", {**links, **DRAWING})
    _write_json(folder / "card.json", card)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_transformer(model: HART, folder: Path, about: dict[str, Any]) -> None:
    """The folder ``llm``: float16, with the authors' names, without the mask that follows from it.

    Args:
        model: the trained transformer.
        folder: where to write.
        about: what the file says of itself.
    """
    config = model.config
    state = untranslate(model.state_dict(), HART_ORIGINAL)
    tensors = {name: tensor.detach().cpu().half() for name, tensor in state.items()}
    tensors |= _buffers(config)
    metadata = {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
    metadata |= {"config": json.dumps(config.to_original()), "trained_dtype": "float32"}
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata=metadata)
    _write_json(folder / "config.json", config.to_original())


def _buffers(config: HARTConfig) -> dict[str, Tensor]:
    """What the authors' class keeps beside its parameters: levels of the slots, a zero bias."""
    lengths = [config.context_tokens, *(side * side for side in config.scales[1:])]
    levels = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    zeros = {
        f"blocks.{i}.attn.zero_k_bias": torch.zeros(config.width).half()
        for i in range(config.depth)
    }
    return {"lvl_1L": levels[None], **zeros}


def _text_statistics(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """The model whose text statistics these are; without one they are kept in the folder."""
    mean, std = hart_data(workspace).states.statistics()
    stored = read_tensors(resolve(BASE) / TEXT_STATS)
    if torch.allclose(stored["mean"], mean) and torch.allclose(stored["std"], std):
        return {"base": BASE}
    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, folder / TEXT_STATS)
    return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
