"""Write a trained VILA-U in the published layout: three folders, float16, with their papers."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gesso_core.evaluate.vila_u import EXAMPLES, PER_SET, ExampleSets
from gesso_core.hub.load_vila_u import LLM
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.keys.vila_u import DEPTH_TRANSFORMER
from gesso_core.models.keys.vila_u_tower import DEPTH_PREFIX
from gesso_core.models.vila_u.model import VilaU
from gesso_core.safe_files import write_tensors
from gesso_core.train.packages import LOCK_HASH
from gesso_core.train.publish import LICENCE, git_revision
from gesso_core.train.publish_vila_u_tower import publish_projector, publish_tower
from gesso_core.train.run_state import load_averaged, read_counters
from gesso_core.train.vila_u import RUN, SEED, STATE, Trained, prepared

if TYPE_CHECKING:
    from gesso_core.train.stages import Workspace

MODEL: Final = "vilau-tiny"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


def publish_vila_u(
    model: VilaU, tokenizer: Path, folder: Path, *, about: Mapping[str, Any] | None = None
) -> None:
    """Write everything that loading needs.

    Args:
        model: trained; its language model is a Llama of transformers.
        tokenizer: folder of its tokenizer.
        folder: where to write.
        about: further entries of the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "model": folder.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_lock_sha256": LOCK_HASH,
        "trainer_revision": git_revision(),
        "license": LICENCE,
        **(about or {}),
    }
    metadata = {key: v if isinstance(v, str) else json.dumps(v) for key, v in card.items()}
    depth = untranslate(model.depth_transformer.state_dict(), DEPTH_TRANSFORMER)
    grid = model.config.tower.grid
    publish_tower(
        model.tower,
        folder,
        extra={f"{DEPTH_PREFIX}{name}": tensor for name, tensor in depth.items()},
        extra_config={"rqtransformer": model.config.depth.to_original(grid)},
        about=metadata,
    )
    publish_projector(model.projector, folder, metadata)
    _write_llm(model, tokenizer, folder / LLM, metadata)
    _write_json(folder / "config.json", _top_config(model))
    _write_json(folder / "card.json", card)


def run_publish_vila_u(workspace: "Workspace") -> None:
    """Write the weight folder from the newest saved states, with pictures for its evaluation."""
    model, _ = prepared(workspace)
    run, folder = workspace.run / RUN, workspace.weights / MODEL
    load_averaged(Trained(model), run / STATE)
    counters, sprites = read_counters(run / STATE), workspace.drawn_sprites()
    publish_vila_u(
        model.eval(),
        run / "tokenizer",
        folder,
        about={
            "seed": SEED,
            "concepts": len(sprites.concepts),
            "updates": counters["step"],
            "samples": counters["samples"],
            "wall_seconds": round(counters["used_s"]),
        },
    )
    size = model.config.tower.image_size
    ExampleSets.of(sprites, size, PER_SET).save(folder / EXAMPLES)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def _top_config(model: VilaU) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["VILAULlamaModel"],
        "model_type": "vila_u_llama",
        "hidden_size": config.state_width,
        "image_aspect_ratio": "resize",
        "mm_hidden_size": config.tower.width,
        "mm_use_im_start_end": True,
        "mm_use_vi_start_end": config.video_frames > 0,
        "mm_use_im_patch_token": False,
        "num_video_frames": config.video_frames,
        "chat_template_gesso": asdict(config.template),
        "judge_gesso": config.judges_by,
    }


def _write_llm(model: VilaU, tokenizer: Path, folder: Path, metadata: dict[str, str]) -> None:
    state = model.llm.state_dict()
    half = {name: tensor.detach().cpu().half() for name, tensor in state.items()}
    write_tensors(folder / "model.safetensors", half, {**metadata, "trained_dtype": "float32"})
    values = model.llm.config.to_dict()
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    values |= {"architectures": [type(model.llm).__name__], "dtype": "float32"}
    _write_json(folder / "config.json", values)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
