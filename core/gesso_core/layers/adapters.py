"""Which low-rank factors are added to which layer, in this thread, right now.

A layer asks `active_low_rank` in its forward; whoever runs the network decides with `adapters`:

    with adapters(stack):
        velocity = model(latent, time, text)

The choice is a context variable, so that threads and tasks with different adapters may use one
model at the same time. While no adapter is in use anywhere, a layer pays one read of a global.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

# R rank   K input features   N output features
LowRank = tuple[Tensor, Tensor]
"""(down [R, K], up [N, R]); strength and alpha are inside ``up``."""


class Adapters(Protocol):
    """Knows the factors of every layer."""

    def low_rank(self, module: nn.Module) -> LowRank | None:
        """The factors of ``module``, None where it has none."""
        ...


_active: ContextVar[Adapters | None] = ContextVar("adapters", default=None)
# Tracers cannot read a context variable. They can guard on a plain flag: a graph compiled without
# adapters is then not used with them, and tracing with them ends in the error of the tracer.
_in_use = False
_users = 0
_lock = Lock()


def active_low_rank(module: nn.Module) -> LowRank | None:
    """The factors to add to the output of ``module``, None if there are none.

    They act on the layer's input as it comes, before any smoothing: ``y += (x downᵀ) upᵀ``, before
    the activation.
    """
    if not _in_use:
        return None
    chosen = _active.get()
    return None if chosen is None else chosen.low_rank(module)


@contextmanager
def adapters(chosen: Adapters | None) -> Iterator[None]:
    """Add the low-rank factors of ``chosen`` to its layers inside the block; None adds nothing."""
    token = _active.set(chosen)
    if chosen is not None:
        _count(1)
    try:
        yield
    finally:
        if chosen is not None:
            _count(-1)
        _active.reset(token)


def low_rank_product(x: Tensor, low_rank: LowRank) -> Tensor:
    """``(x downᵀ) upᵀ``: (..., K) → (..., N)."""
    down_RK, up_NR = low_rank
    return F.linear(F.linear(x, down_RK), up_NR)


def _count(change: int) -> None:
    global _in_use, _users
    with _lock:
        _users += change
        _in_use = _users > 0
