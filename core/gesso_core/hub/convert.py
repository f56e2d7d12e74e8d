"""The one place where a pickle is opened: an explicit conversion to safetensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.errors import UnsafeFile, WeightsError


def convert_pickle(source: Path, target: Path) -> list[str]:
    """Write the tensors of a ``.pth`` / ``.pt`` / ``.bin`` file to a safetensors file.

    Only tensors and plain containers are read (``weights_only=True``), so nothing in the file runs.
    The file holds a state dict, or ``{"state_dict": …}`` around one; other entries beside
    ``"state_dict"``, such as an optimizer's state, are left out.

    Returns:
        The keys that were written, sorted.

    Raises:
        UnsafeFile: the file wants to build anything but tensors.
        WeightsError: it is missing, damaged, or not a state dict.
    """
    if target.suffix != ".safetensors":
        raise WeightsError(f"the target {target} must end with .safetensors")
    state = _state_dict(source, open_pickle(source))
    # Tied weights share memory, which safetensors refuses; each key gets its own copy.
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata={"format": "pt", "converted_from": source.name})
    return sorted(tensors)


def open_pickle(source: Path) -> Any:
    """The content of a pickle, if it is tensors and plain containers only; for conversions.

    Raises:
        UnsafeFile: the file wants to build anything but tensors.
        WeightsError: it is missing or damaged.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=None)
    except FileNotFoundError as error:
        raise WeightsError(f"{source} does not exist; give the file to convert") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UnsafeFile(
            f"{source} holds more than tensors, so it stays closed ({reason}); "
            "ask its author for a safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{source} cannot be read ({error}); download it again") from error


def _state_dict(source: Path, loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise WeightsError(
            f"{source} holds a {type(loaded).__name__}, expected a state dict "
            "(key to tensor) or {'state_dict': …}"
        )
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{source} is not a state dict: entry {str(key)[:80]!r} is a "
                f"{type(value).__name__}, expected tensors; save the model's state_dict() alone"
            )
    return dict(loaded)
