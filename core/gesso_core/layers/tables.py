"""Learned tables and their first values."""

import torch
from torch import nn


def normal_table(*shape: int, scale: float) -> nn.Parameter:
    """A table drawn from N(0, ``scale``²).

    On the meta device nothing is drawn, and nothing may be computed either: arithmetic there makes
    torch import its compiler, which takes a second of every process that loads a model.
    """
    drawn = torch.randn(shape)
    return nn.Parameter(drawn if drawn.is_meta else drawn * scale)
