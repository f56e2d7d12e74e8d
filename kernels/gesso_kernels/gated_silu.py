"""Gated SiLU over channels (GLU, second half as gate):  y = a · silu(g)  with  [a | g] = x.

The halves are taken along ``dim``, so the same function serves [B, 2C, H, W] convolutions and
[B, N, 2C] tokens.
"""

import torch.nn.functional as F
from torch import Tensor


def gated_silu_ref(x: Tensor, dim: int = 1) -> Tensor:
    """The formula: value half times SiLU of the gate half."""
    value, gate = x.chunk(2, dim=dim)
    return value * (gate * gate.sigmoid())


def gated_silu(x: Tensor, dim: int = 1) -> Tensor:
    """First half along ``dim`` times SiLU of the second half; halves that dimension."""
    value, gate = x.chunk(2, dim=dim)
    return value * F.silu(gate)
