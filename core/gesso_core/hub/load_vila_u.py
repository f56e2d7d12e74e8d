"""A VILA-U from its published layout: the folders ``llm``, ``vision_tower``, ``mm_projector``.

Strict like the other loaders: every key is consumed or named in an error. The language model is one
of transformers, built without memory and then filled; the depth transformer's weights lie in the
tower's folder.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.hub.checkpoint import load_state_dict
from gesso_core.hub.load_vila_u_tower import (
    PROJECTOR_FOLDER,
    TOWER_FOLDER,
    build_tower,
    load_vila_u_projector,
)
from gesso_core.models.keys.translate import Rule, translate
from gesso_core.models.keys.vila_u import DEPTH_TRANSFORMER
from gesso_core.models.keys.vila_u_tower import DEPTH_PREFIX
from gesso_core.models.vila_u.config import SPECIAL_TOKENS, VilaUConfig
from gesso_core.models.vila_u.depth_transformer import DepthTransformer
from gesso_core.models.vila_u.model import VilaU
from gesso_core.safe_files import read_json

LLM: Final = "llm"


def vila_u_config(folder: Path) -> VilaUConfig:
    """The configuration of a whole model."""
    top = read_json(folder / "config.json")
    parts = [
        read_json(folder / part / "config.json") for part in (LLM, TOWER_FOLDER, PROJECTOR_FOLDER)
    ]
    return VilaUConfig.from_original(top, *parts)


def load_vila_u_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VilaU:
    """The network in eval mode.

    Args:
        folder: in the published layout.
        dtype: of all parameters; codes are searched for in float32 in any case.
        device: where it is put.

    Raises:
        WeightsError: missing, damaged or foreign weights.
        ConfigError: folders that are not of one model.
    """
    config = vila_u_config(folder)
    stored = load_state_dict(folder / TOWER_FOLDER)
    tower = build_tower(stored, config.tower, dtype)
    projector = load_vila_u_projector(folder, dtype)
    if (projector.feature_width, projector.embedding_width) != (
        config.tower.width,
        config.state_width,
    ):
        raise WeightsError(
            f"{folder / PROJECTOR_FOLDER} projects {projector.feature_width} channels to "
            f"{projector.embedding_width}, expected {config.tower.width} to {config.state_width}; "
            "the folders are not of one model"
        )
    with torch.device("meta"):
        depth = DepthTransformer(config.depth)
    of_depth = {
        k.removeprefix(DEPTH_PREFIX): v for k, v in stored.items() if k.startswith(DEPTH_PREFIX)
    }
    _fill(depth, translate(of_depth, DEPTH_TRANSFORMER, expected=depth.state_dict()), dtype)
    model = VilaU(config, tower, projector, depth, _language_model(folder / LLM, dtype))
    return model.to(device).eval().requires_grad_(False)


def load_vila_u_tokenizer(folder: Path, config: VilaUConfig) -> Any:
    """The tokenizer of a model; the four markers must be where the weights have them.

    Raises:
        WeightsError: it has no such markers, or elsewhere.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder / LLM), local_files_only=True, legacy=False
        )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder / LLM} holds no tokenizer that can be read ({error}); download it again"
        ) from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    expected = [config.im_start, config.im_end, config.vi_start, config.vi_end]
    if found != expected:
        raise WeightsError(
            f"the tokenizer has the markers of pictures and videos at {found}, the weights at "
            f"{expected}; use the tokenizer of the same release"
        )
    return tokenizer


def _language_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} describes no known model: {error}") from error
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    # Tables of rotary frequencies are computed, not loaded; old files hold them all the same.
    stored = {k: v for k, v in load_state_dict(folder).items() if not k.endswith(".inv_freq")}
    if config.tie_word_embeddings:
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    _fill(model, _of_ours(model, stored), dtype)
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            type(module).__init__(module, config=config)  # outside of the meta device this time
    return model


def _of_ours(module: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state under the module's own names, checked."""
    expected = module.state_dict()
    return translate(stored, [Rule(name, name) for name in expected], expected=expected)


def _fill(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    module.load_state_dict(cast, strict=True, assign=True)
