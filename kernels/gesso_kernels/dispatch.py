"""When a public function calls its registered op, and how its kernel is launched: on the GPU of its
tensors, for one of a few ranks.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def calls_op(*tensors: Tensor | None) -> bool:
    """True on CUDA and while torch traces; not for gradients or fp64, which the ops do not have.

    On a CPU the body of every op is its reference; calling that directly saves the dispatch.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not (given[0].is_cuda or torch.compiler.is_compiling()):
        return False
    if given[0].dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def on_its_device(
    launcher: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Run a launcher with the GPU of its first tensor as the current one: Triton launches there."""

    @wraps(launcher)
    def launch(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return launcher(first, *args, **kwargs)

    return launch


def compiled_rank(rank: int) -> int:
    """R that a kernel is compiled for: a power of two from 16 on, or 0 without a branch.

    LoRAs come and go, each with its own rank; so they share a few compiled kernels.
    """
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0
