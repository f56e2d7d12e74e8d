"""Compose training pictures from sprites: background colors and augmentation.

Axes: B batch, C channel, H height, W width. Sprites are premultiplied RGBA in [0, 1]; pictures are
RGB in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PALETTE: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.06),
    "gray": (0.55, 0.55, 0.57),
    "red": (0.86, 0.20, 0.20),
    "orange": (0.97, 0.58, 0.15),
    "yellow": (0.98, 0.88, 0.30),
    "green": (0.25, 0.68, 0.35),
    "teal": (0.12, 0.60, 0.60),
    "blue": (0.20, 0.42, 0.88),
    "purple": (0.55, 0.30, 0.75),
    "pink": (0.97, 0.65, 0.78),
    "brown": (0.50, 0.33, 0.20),
}
COLORS = tuple(PALETTE)
PALETTE_K3 = torch.tensor(list(PALETTE.values()))
JITTER = 0.05


def palette_colors(index_B: Tensor, generator: Generator | None = None) -> Tensor:
    """Colors (B, 3) in [0, 1]; with a generator, every color but white is jittered by ±0.05."""
    colors_B3 = PALETTE_K3[index_B]
    if generator is None:
        return colors_B3
    noise = (torch.rand(colors_B3.shape, generator=generator) * 2 - 1) * JITTER
    return torch.where(index_B[:, None] == 0, colors_B3, colors_B3 + noise).clamp(0, 1)


def mixed_colors(batch: int, generator: Generator) -> Tensor:
    """Backgrounds (B, 3) for the autoencoder: white, palette with jitter, or any color at all."""
    index = torch.randint(len(COLORS), (batch,), generator=generator)
    palette = palette_colors(index, generator)
    anything = torch.rand((batch, 3), generator=generator)
    kind = torch.rand((batch, 1), generator=generator)
    return torch.where(kind < 0.2, torch.ones(3), torch.where(kind < 0.65, palette, anything))


def sprites_to_float(pixels_BHW4: Tensor) -> Tensor:
    """uint8 (B, H, W, 4) to float (B, 4, H, W) in [0, 1]."""
    return pixels_BHW4.permute(0, 3, 1, 2).float() / 255


def composite(sprite_B4HW: Tensor, color_B3: Tensor) -> Tensor:
    """Lay premultiplied sprites on flat colors; returns (B, 3, H, W) in [-1, 1]."""
    alpha = sprite_B4HW[:, 3:]
    return (sprite_B4HW[:, :3] + (1 - alpha) * color_B3[:, :, None, None]) * 2 - 1


def shrink(picture_BCHW: Tensor, size: int) -> Tensor:
    """Area-average to a side that divides the present one."""
    factor = picture_BCHW.shape[-1] // size
    return picture_BCHW if factor == 1 else F.avg_pool2d(picture_BCHW, factor)


def augment(
    sprite_B4HW: Tensor,
    generator: Generator,
    *,
    scale: tuple[float, float] = (0.72, 1.02),
    shift: float = 0.15,
    flip: float = 0.3,
    untouched: float = 0.35,
) -> Tensor:
    """Scale, shift and mirror sprites on their canvas; some views stay as they are.

    Args:
        scale: smallest and largest side of the sprite, as a fraction of the canvas.
        shift: largest shift as a fraction of the canvas.
        flip: share of mirrored views among the changed ones.
        untouched: share of unchanged views.
    """
    batch = sprite_B4HW.shape[0]
    size = scale[0] + (scale[1] - scale[0]) * torch.rand(batch, generator=generator)
    offset = (torch.rand((batch, 2), generator=generator) * 2 - 1) * shift * 2
    mirrored = torch.rand(batch, generator=generator) < flip
    keep = torch.rand(batch, generator=generator) < untouched
    size = torch.where(keep, 1.0, size)
    offset = torch.where(keep[:, None], 0.0, offset)
    sign = torch.where(mirrored & ~keep, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = sign / size
    theta[:, 1, 1] = 1 / size
    theta[:, :, 2] = -offset / size[:, None]
    theta[:, 0, 2] *= sign
    grid = F.affine_grid(theta, list(sprite_B4HW.shape), align_corners=False)
    return F.grid_sample(sprite_B4HW, grid, align_corners=False)
