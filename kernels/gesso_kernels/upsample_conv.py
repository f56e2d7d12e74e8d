"""Nearest ×2 upsampling followed by a 3×3 convolution, computed at the low resolution.

Of the nine taps that reach a high-resolution pixel, those that fall on the same low-resolution
pixel can be added up beforehand. What remains is one 2×2 kernel for each of the four phases (i, j)
of the output: 16 products instead of 36.

    y[2h+i, 2w+j] = Σ_{a,b ∈ {0,1}}  K_ij[a, b] · x[h+i-1+a, w+j-1+b]

All phases are computed by one 2×2 convolution with padding 1; phase (i, j) reads its result at
(h+i, w+j).
"""

# B batch   C input channels   O output channels   H height   W width

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# The taps of a row that fall on the first and on the second low-resolution pixel, per phase.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
_POSITIONS = tuple(product((0, 1), repeat=4))


def upsample_conv2d_ref(x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None) -> Tensor:
    """Upsampling, then convolution, as written."""
    x = F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
    return F.conv2d(x, weight_OC33, bias_O, padding=1)


def fold_phases(weight_OC33: Tensor) -> Tensor:
    """[O, C, 3, 3] to [4·O, C, 2, 2], phases (0,0), (0,1), (1,0), (1,1) one after the other."""
    phases = weight_OC33.new_empty(2, 2, *weight_OC33.shape[:2], 2, 2)
    for i, j, a, b in _POSITIONS:
        taps = [weight_OC33[..., k, m].float() for k in _TAPS[i][a] for m in _TAPS[j][b]]
        phases[i, j, :, :, a, b] = torch.stack(taps).sum(dim=0)
    return phases.flatten(0, 2)


def upsample_conv2d(x_BCHW: Tensor, phases_4OC22: Tensor, bias_O: Tensor | None) -> Tensor:
    """[B, C, H, W] to [B, O, 2H, 2W] with the kernels of `fold_phases`."""
    height, width = x_BCHW.shape[-2:]
    bias = None if bias_O is None else bias_O.repeat(4)
    y = F.conv2d(x_BCHW, phases_4OC22, bias, padding=1)
    y = y.view(len(y), 2, 2, -1, height + 1, width + 1)  # B i j O H+1 W+1
    phases = [[y[:, i, j, :, i : i + height, j : j + width] for j in (0, 1)] for i in (0, 1)]
    rows = [torch.stack(row, dim=-1).flatten(-2) for row in phases]
    return torch.stack(rows, dim=-2).flatten(-3, -2)
