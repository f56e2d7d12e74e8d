"""The two families that draw token by token, behind one face for the service."""

from pathlib import Path
from typing import Any

import torch
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines import vila_u_room
from gesso_core.pipelines.draw import Draws, family_of
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_load import load_vila_u


def load(
    name_or_folder: str | Path, *, dtype: torch.dtype | None, device: str, store: Path, name: str
) -> Draws:
    """A model of either family, by its registry name or from a folder."""
    if family_of(name_or_folder) == "hart":
        return load_hart(name_or_folder, dtype=dtype, device=device, store=store, name=name)
    return load_vila_u(name_or_folder, dtype=dtype, device=device, store=store, name=name)


def sees(model: Draws) -> bool:
    """Does it look at pictures themselves, not only at their latents?"""
    return isinstance(model, VilaUPipeline)


def seeing(model: Draws) -> VilaUPipeline:
    """The model itself when it sees; InvalidRequest otherwise."""
    if isinstance(model, VilaUPipeline):
        return model
    raise InvalidRequest(
        f"{model.entry.name} draws pictures and does nothing else; ask a model that sees, such as "
        "vilau-tiny",
        field="model",
    )


def drawing_bytes(model: Draws, recipe: Any, *, shown: bool) -> int:
    """Bytes of keys and values of a picture under way; ``shown``: another one was given."""
    if isinstance(model, VilaUPipeline):
        in_prompt = shown and recipe.keep is None
        return vila_u_room.drawing_bytes(model, recipe, shown=in_prompt)
    assert isinstance(model, HartPipeline)
    return model.kv_bytes(recipe)
