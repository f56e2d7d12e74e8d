"""Write a trained vision tower and projector in the published layout of VILA-U, in float16.

``folder/vision_tower`` holds the tower and whatever else belongs into its file (the depth
transformer); ``folder/mm_projector`` the projector. Tensors with two names are stored once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gesso_core.hub.load_vila_u_tower import PROJECTOR_FOLDER, TOWER_FOLDER
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.keys.vila_u_tower import PROJECTOR, tower_aliases, write_tower
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.safe_files import write_tensors

WEIGHTS = "model.safetensors"


def publish_tower(
    tower: VisionTower,
    folder: Path,
    *,
    extra: Mapping[str, Tensor] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write ``folder/vision_tower``.

    Args:
        tower: the trained tower.
        folder: of the whole model.
        extra: further tensors of the same file under their published names (``rqtransformer.…``).
        extra_config: further entries of its ``config.json`` (``rqtransformer``).
        about: metadata of the file.
    """
    config = tower.config
    tensors = write_tower(tower.state_dict(), config)
    for alias in tower_aliases(config):
        tensors.pop(alias, None)
    values = {
        "architectures": ["RQVAESIGLIPTransformer"],
        "model_type": "rqvaesigliptransformer_model",
        "hidden_size": config.encoder.hidden_size,
        "rqvaesiglip": config.to_original(),
        **(extra_config or {}),
    }
    _write(folder / TOWER_FOLDER, {**tensors, **(extra or {})}, values, about)


def publish_projector(
    projector: Projector, folder: Path, about: Mapping[str, str] | None = None
) -> None:
    """Write ``folder/mm_projector``."""
    values = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": projector.kind,
    }
    _write(folder / PROJECTOR_FOLDER, untranslate(projector.state_dict(), PROJECTOR), values, about)


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    about: Mapping[str, str] | None,
) -> None:
    half = {name: tensor.detach().cpu().half() for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, half, {"trained_dtype": "float32", **(about or {})})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
