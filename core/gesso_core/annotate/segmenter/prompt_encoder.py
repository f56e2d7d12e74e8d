"""SAM's prompt encoder: points, corners of boxes and former masks as a decoder reads them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# P prompts   T tokens   X places   N positions of the picture   C channels
# G side of the grid, N = G·G   L = 4·G side of the logits


class PromptEncoder(nn.Module):
    """Points and corners as tokens, former masks as a picture of features."""

    def __init__(self, channels: int, edge: int, grid: int) -> None:
        super().__init__()
        self.edge, self.grid = edge, grid
        self.frequencies = nn.Parameter(torch.zeros(2, channels // 2))
        # Rows: padding, background, object, top left, bottom right; labels start at -1.
        self.kinds = nn.Parameter(torch.zeros(5, channels))
        self.no_mask = nn.Parameter(torch.zeros(1, channels))
        self.mask1 = nn.Conv2d(1, 4, 2, stride=2)
        self.mask_norm1 = nn.LayerNorm(4, eps=1e-6)
        self.mask2 = nn.Conv2d(4, 16, 2, stride=2)
        self.mask_norm2 = nn.LayerNorm(16, eps=1e-6)
        self.mask3 = nn.Conv2d(16, channels, 1)

    def positions(self, unit_X2: Tensor) -> Tensor:
        """Random Fourier features of places (x, y) in [0, 1]."""
        angles = 2 * math.pi * ((2 * unit_X2 - 1) @ self.frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid_positions(self) -> Tensor:
        """Of the picture's positions, (N, C), row by row."""
        centres = (torch.arange(self.grid, device=self.kinds.device) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.positions(torch.stack([x, y], dim=-1)).flatten(0, 1)

    def tokens(self, places_PT2: Tensor, labels_PT: Tensor) -> Tensor:
        """(P, T, C) from places in the frame; padding has a kind but no place."""
        positions_PTC = self.positions((places_PT2 + 0.5) / self.edge)
        return positions_PTC * (labels_PT >= 0)[..., None] + self.kinds[labels_PT + 1]

    def mask_features(self, masks_P1LL: Tensor | None) -> Tensor:
        """What a former mask adds to the picture, (P, N, C); (1, 1, C) when there is none."""
        if masks_P1LL is None:
            return self.no_mask[None]
        x = F.gelu(_norm_channels(self.mask_norm1, self.mask1(masks_P1LL)))
        x = F.gelu(_norm_channels(self.mask_norm2, self.mask2(x)))
        features_PCGG: Tensor = self.mask3(x)
        return features_PCGG.flatten(2).mT


def _norm_channels(norm: nn.LayerNorm, x_PCHW: Tensor) -> Tensor:
    normed: Tensor = norm(x_PCHW.permute(0, 2, 3, 1))
    return normed.permute(0, 3, 1, 2)
