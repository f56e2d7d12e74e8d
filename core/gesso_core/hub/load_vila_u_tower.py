"""VILA-U's vision tower and projector from folders of the published layout.

A model folder holds ``vision_tower`` and ``mm_projector``, each with its own ``config.json``.
Nothing is downloaded: the configuration of the SigLIP encoder is known here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.hub.checkpoint import load_state_dict
from gesso_core.models.keys.translate import translate
from gesso_core.models.keys.vila_u_tower import PROJECTOR, read_tower
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.tower_config import TowerConfig
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.safe_files import read_json

TOWER_FOLDER, PROJECTOR_FOLDER = "vision_tower", "mm_projector"


def load_vila_u_tower(
    path: Path, dtype: torch.dtype = torch.float32, *, config: TowerConfig | None = None
) -> VisionTower:
    """A tower in eval mode.

    Args:
        path: a model folder, its ``vision_tower``, or one safetensors file with ``config``.
        dtype: of the parameters. Codes are looked up in float32 whatever it is, but features that
            were computed in bfloat16 may choose other codes where two rows are nearly as near.
        config: instead of the folder's ``config.json``.

    Raises:
        WeightsError: missing, damaged or foreign weights.
        ConfigError: the configuration contradicts itself or is unknown.
    """
    path = path / TOWER_FOLDER if (path / TOWER_FOLDER).is_dir() else path
    config = config or tower_config(path)
    return build_tower(load_state_dict(path), config, dtype)


def build_tower(
    stored: Mapping[str, Tensor], config: TowerConfig, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """A tower in eval mode from the tensors of a ``vision_tower`` file; others are passed over."""
    with torch.device("meta"):
        tower = VisionTower(config)
    state = read_tower(stored, config, tower.state_dict())
    _fill_absent(tower, state)
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    tower.load_state_dict(cast, strict=True, assign=True)
    positions = config.encoder.grid**2
    tower.encoder.embeddings.position_ids = torch.arange(positions)[None]  # is in no file
    return tower.eval().requires_grad_(False)


def tower_config(path: Path) -> TowerConfig:
    """The configuration in a ``vision_tower`` folder."""
    values = _config(path).get("rqvaesiglip")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path / 'config.json'} has no 'rqvaesiglip'; give the folder 'vision_tower' of a "
            "VILA-U model"
        )
    return TowerConfig.from_original(values)


def load_vila_u_projector(path: Path, dtype: torch.dtype = torch.float32) -> Projector:
    """A projector in eval mode; its widths are those of its weights.

    Args:
        path: a model folder, or its ``mm_projector``.
        dtype: of the parameters.

    Raises:
        WeightsError: missing, damaged or foreign weights.
        ConfigError: an unknown kind of projector.
    """
    path = path / PROJECTOR_FOLDER if (path / PROJECTOR_FOLDER).is_dir() else path
    kind = str(_config(path).get("mm_projector_type", ""))
    state = translate(load_state_dict(path), PROJECTOR)
    first = state.get("layers.0.weight", state.get("layers.weight"))
    if first is None or first.ndim != 2:
        raise WeightsError(f"{path} holds no linear layer, which a projector {kind!r} begins with")
    with torch.device("meta"):
        projector = Projector(kind, feature_width=first.shape[1], embedding_width=first.shape[0])
    state = translate(load_state_dict(path), PROJECTOR, projector.state_dict())
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    projector.load_state_dict(cast, strict=True, assign=True)
    return projector.eval().requires_grad_(False)


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} comes without a config.json; give a folder of a VILA-U model")
    return read_json(path / "config.json")


def _fill_absent(tower: VisionTower, state: dict[str, Tensor]) -> None:
    """Files for inference may lack the contrastive branch and the averages of the tables."""
    expected = tower.state_dict()
    absent = expected.keys() - state.keys()
    for name in absent:
        if name.endswith("sums_VC"):
            state[name] = state[name.replace("sums_VC", "table_VC")][:-1].clone()
        elif name.endswith("counts_V"):
            state[name] = torch.ones(expected[name].shape)
        else:
            state[name] = torch.zeros(expected[name].shape)
            tower.has_contrastive_branch = False
