"""Rotary positions of HART: text slots on a line, visual slots on the grid of the largest scale.

A visual token at row i, column j of a p x p scale stands at ``(i·P/p, j·P/p)``, P being the largest
side, both shifted by the sample's last text position. The angles of a head are ``[row, row, col,
col]`` over d/4 frequencies each, while the rotation pairs channel c with c + d/2, so that a pair
mixes a row angle with a column angle. It is not a rotation in the strict sense, and is reproduced
because the weights were trained with it.
"""

import torch
from torch import Tensor

# B batch   H heads   N slots   L text slots   d channels of a head   F frequencies


def frequencies(head_dim: int, step: int, theta: float) -> Tensor:
    """``theta^(-i/d)`` for i = 0, step, 2·step, …; (d/step,) fp32."""
    exponent = torch.arange(0, head_dim, step, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponent)


def text_angles(positions_BL: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles (B, L, d) of whole-numbered positions."""
    waves_F = frequencies(head_dim, 2, theta).to(positions_BL.device)
    angle_BLF = positions_BL[..., None].float() * waves_F
    return torch.cat([angle_BLF, angle_BLF], dim=-1)


def grid_positions(side: int, largest: int, device: torch.device | None = None) -> Tensor:
    """(side², 2) row and column of every token, in units of the largest scale; row-major."""
    line = torch.arange(side, dtype=torch.float32, device=device) * (largest / side)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=-1)


def grid_angles(positions_BN2: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles (B, N, d) of (row, column) positions."""
    waves_F = frequencies(head_dim, 4, theta).to(positions_BN2.device)
    row_BNF, column_BNF = (positions_BN2[..., None] * waves_F).unbind(dim=-2)
    return torch.cat([row_BNF, row_BNF, column_BNF, column_BNF], dim=-1)


def cos_sin(angles_BNd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, N, d), ready to be multiplied with heads."""
    angles = angles_BNd[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHNd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by the angles of their slots."""
    cos, sin = table
    first, second = x_BHNd.chunk(2, dim=-1)
    return x_BHNd * cos + torch.cat([-second, first], dim=-1) * sin
