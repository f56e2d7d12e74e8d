"""Tensors as the bytes of a safetensors file: how latents and text states travel."""

from collections.abc import Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gesso_core.errors import InvalidRequest


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors, by name, on whatever device they are, as one safetensors file."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def unpack_tensor(data: bytes, name: str) -> Tensor:
    """The one tensor ``name`` of such a file; InvalidRequest says what the bytes were instead."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvalidRequest(
            f"these {len(data):,} bytes are not a safetensors file ({error}); send tensor {name!r} "
            "in one",
            field=name,
        ) from error
    if tensors.keys() != {name}:
        held = ", ".join(sorted(tensors)[:8]) or "nothing"
        raise InvalidRequest(f"expected one tensor named {name!r}, found {held}", field=name)
    return tensors[name]
