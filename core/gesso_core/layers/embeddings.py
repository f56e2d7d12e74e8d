"""Sinusoids of times and positions, and the small networks that read them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.layers.linear import Linear


def timestep_sinusoid(
    timestep_B: Tensor,
    channels: int,
    *,
    cos_first: bool = True,
    max_period: float = 10_000.0,
    frequency_shift: float = 0.0,
) -> Tensor:
    """Fourier features of a scalar, in fp32.

    ``ω_k = max_period^(-k / (channels/2 - frequency_shift))``, the cosine half first by default; an
    odd number of channels ends with a zero.

    Args:
        timestep_B: (B,) of any real dtype; the argument is used as it is.
        channels: number of features.
        cos_first: whether the cosines fill the first half.
        max_period: period of the slowest wave, over 2π.
        frequency_shift: 1 makes the slowest wave reach ``max_period`` exactly.

    Returns:
        (B, channels) fp32.
    """
    half = channels // 2
    # fp32, in this order: at t = 999 another rounding of ω would move the features by 1e-4.
    exponent = -math.log(max_period) * torch.arange(
        half, dtype=torch.float32, device=timestep_B.device
    )
    angle = timestep_B[:, None].float() * torch.exp(exponent / (half - frequency_shift))
    waves = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, channels % 2))


def sincos_table(
    width: int, height_tokens: int, width_tokens: int, *, base: int, scale: float = 1.0
) -> Tensor:
    """The 2-D position table of the 2K and 4K Sana models.

    The grid is stretched so that either side spans ``base / scale`` whatever its number of tokens.
    The first half of the channels encodes the column, the second half the row; each half is sines,
    then cosines. Positions are rounded to fp32 as published, the waves are computed in fp64.

    Args:
        width: channels, a multiple of 4.
        height_tokens: rows h of the token grid.
        width_tokens: columns w of the token grid.
        base: side of the grid that the model was trained at, in tokens.
        scale: interpolation scale of the checkpoint.

    Returns:
        (h·w, width) fp32, row-major.
    """
    rows = torch.arange(height_tokens, dtype=torch.float32) / (height_tokens / base) / scale
    columns = torch.arange(width_tokens, dtype=torch.float32) / (width_tokens / base) / scale
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def waves(positions: Tensor) -> Tensor:
        angle = torch.outer(positions.double(), omega)
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    column_waves = waves(columns)[None].expand(height_tokens, -1, -1)
    row_waves = waves(rows)[:, None].expand(-1, width_tokens, -1)
    return torch.cat([column_waves, row_waves], dim=-1).flatten(0, 1)


class PositionTable:
    """The sin-cos table of each grid that was asked for, made once."""

    def __init__(self, width: int, base: int, scale: float, capacity: int = 4) -> None:
        self.width, self.base, self.scale, self.capacity = width, base, scale, capacity
        self._tables: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, height_tokens: int, width_tokens: int, like: Tensor) -> Tensor:
        """(h·w, width) in the dtype and on the device of ``like``."""
        key = (height_tokens, width_tokens, like.device, like.dtype)
        if key not in self._tables:
            # A table made in inference mode could not be used by a later training step.
            with torch.inference_mode(False):
                table = sincos_table(
                    self.width, height_tokens, width_tokens, base=self.base, scale=self.scale
                ).to(like.device, like.dtype)
            while len(self._tables) >= self.capacity:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = table
        return self._tables[key]


class ScalarEmbedding(nn.Module):
    """A scalar per sample → sinusoid → Linear → SiLU → Linear."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = Linear(self.frequencies, width)
        self.out = Linear(width, width)

    def forward(self, scalar_B: Tensor) -> Tensor:
        """(B,) → (B, D) in the dtype of the weights."""
        waves = timestep_sinusoid(scalar_B, self.frequencies)
        embedded: Tensor = self.out(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))
        return embedded
