"""Large images through a DC-AE in overlapping tiles, with linear cross-fades.

Attention looks at a whole tile, so tiles differ a little from the full image; the overlap hides it.
Tiles are aligned to latent cells and the result has exactly the size of the untiled one.
`encode_safely` and `decode_safely` tile on their own, before memory runs out.
"""

# B batch   C channels   H height   W width   one cell = one latent pixel = f×f image pixels

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gesso_core.errors import ConfigError, NumericalError, OutOfMemory
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_memory import (
    activation_bytes_per_pixel,
    available_memory,
    is_out_of_memory,
)

_SMALLEST_TILE = 4  # cells; below, attention and padding dominate what is seen
_USABLE = 0.8  # of the memory that is available


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes in image pixels: a number, or (height, width); multiples of f.

    ``last`` says what happens at the right and lower edge: a ``full`` tile is moved inwards, so
    that it sees as much as the others; a ``short`` tile is cut off, as diffusers does.
    """

    tile: int | tuple[int, int]
    stride: int | tuple[int, int]  # between tiles; what is left of a tile is the cross-fade
    last: Literal["full", "short"] = "full"

    def __post_init__(self) -> None:
        for tile, stride in zip(_pair(self.tile), _pair(self.stride), strict=True):
            if not 0 < stride <= tile:
                raise ConfigError(f"a stride of {stride} px does not cover tiles of {tile} px")

    def cells(self, ratio: int) -> tuple["_Axis", "_Axis"]:
        """Tile and stride along height and width, in latent cells."""
        axes = []
        for tile, stride in zip(_pair(self.tile), _pair(self.stride), strict=True):
            if tile % ratio or stride % ratio:
                raise ConfigError(
                    f"tiles of {tile} px every {stride} px: both must be multiples of {ratio}"
                )
            axes.append(_Axis(tile // ratio, stride // ratio, self.last == "full"))
        return axes[0], axes[1]


def encode_tiled(model: DCAE, x_BCHW: Tensor, tiling: Tiling) -> Tensor:
    """`DCAE.encode` in tiles: [B, 3, H, W] to [B, C, H/f, W/f]; H and W are multiples of f."""
    ratio = model.config.spatial_compression_ratio
    if x_BCHW.shape[-2] % ratio or x_BCHW.shape[-1] % ratio:
        return model.encode(x_BCHW)  # which says what is wrong with the size
    return _run_tiled(model.encode, x_BCHW, tiling.cells(ratio), ratio, 1)


def decode_tiled(model: DCAE, z_BCHW: Tensor, tiling: Tiling) -> Tensor:
    """`DCAE.decode` in tiles: [B, C, h, w] to [B, 3, f·h, f·w]."""
    ratio = model.config.spatial_compression_ratio
    return _run_tiled(model.decode, z_BCHW, tiling.cells(ratio), 1, ratio)


def encode_safely(model: DCAE, x_BCHW: Tensor, available_bytes: int | None = None) -> Tensor:
    """Encode, in as many pieces as the memory at hand requires.

    Args:
        model: the autoencoder.
        x_BCHW: images in [-1, 1], sides multiples of f.
        available_bytes: memory that may be used; by default what the device has left.

    Raises:
        InvalidRequest: sides that are not multiples of f.
        NumericalError: NaN or infinity in the images.
        OutOfMemory: not even a small tile fits; the message says what would.
    """
    ratio = model.config.spatial_compression_ratio
    _require_finite(x_BCHW, "the images to encode")
    if x_BCHW.shape[-2] % ratio or x_BCHW.shape[-1] % ratio:
        return model.encode(x_BCHW)  # which says what is wrong with the size
    cost = ratio**2 * activation_bytes_per_pixel(model.config.encoder)
    run = _Run(model.encode, x_BCHW, in_cell=ratio, out_cell=1, cell_bytes=cost)
    return run.within(_budget(x_BCHW.device, available_bytes))


def decode_safely(model: DCAE, z_BCHW: Tensor, available_bytes: int | None = None) -> Tensor:
    """Decode, in as many pieces as the memory at hand requires.

    Args:
        model: the autoencoder.
        z_BCHW: unscaled latents.
        available_bytes: memory that may be used; by default what the device has left.

    Raises:
        NumericalError: NaN or infinity in the latents.
        OutOfMemory: not even a small tile fits; the message says what would.
    """
    ratio = model.config.spatial_compression_ratio
    _require_finite(z_BCHW, "the latents to decode")
    cost = ratio**2 * activation_bytes_per_pixel(model.config.decoder)
    run = _Run(model.decode, z_BCHW, in_cell=1, out_cell=ratio, cell_bytes=cost)
    return run.within(_budget(z_BCHW.device, available_bytes))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _require_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise NumericalError(
            f"{what} hold NaN or infinity; the step before this one produced them, look there "
            f"(a number format with too little range is the usual reason)"
        )


def _budget(device: torch.device, available_bytes: int | None) -> float:
    available = available_memory(device) if available_bytes is None else available_bytes
    return math.inf if available is None else _USABLE * available


@dataclass(frozen=True)
class _Axis:
    """Tiles along one side, in cells."""

    tile: int
    stride: int
    full: bool

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """(first own cell, first cell seen, end) of each tile."""
        if not self.full:
            starts = range(0, length, self.stride)
            return [(start, start, min(start + self.tile, length)) for start in starts]
        count = 1 + max(0, math.ceil((length - self.tile) / self.stride))
        starts = range(0, count * self.stride, self.stride)
        last = max(0, length - self.tile)
        return [(s, min(s, last), min(s, last) + min(self.tile, length)) for s in starts]

    @property
    def overlap(self) -> int:
        return self.tile - self.stride


def _run_tiled(
    function: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    axes: tuple[_Axis, _Axis],
    in_cell: int,
    out_cell: int,
) -> Tensor:
    """Apply ``function`` tile by tile; a cell is ``in_cell`` px of x, ``out_cell`` of result."""
    rows, columns = axes
    height, width = (side // in_cell for side in x_BCHW.shape[-2:])
    if height <= rows.tile and width <= columns.tile:
        return function(x_BCHW)
    fade_down, fade_right = rows.overlap * out_cell, columns.overlap * out_cell
    result: Tensor | None = None
    above: list[Tensor] = []
    for own_top, top, bottom in rows.spans(height):
        strip: list[Tensor] = []
        for number, (own_left, left, right) in enumerate(columns.spans(width)):
            seen = x_BCHW[..., top * in_cell : bottom * in_cell, left * in_cell : right * in_cell]
            y = function(seen)[..., (own_top - top) * out_cell :, (own_left - left) * out_cell :]
            if above:
                y = _cross_fade(above[number], y, -2, fade_down)
            if strip:
                y = _cross_fade(strip[-1], y, -1, fade_right)
            strip.append(y)
            if result is None:
                shape = (*y.shape[:2], height * out_cell, width * out_cell)
                result = y.new_empty(shape).contiguous(memory_format=torch.channels_last)
            result[..., own_top * out_cell :, own_left * out_cell :][
                ..., : y.shape[-2], : y.shape[-1]
            ] = y
        above = strip
    assert result is not None
    return result


def _cross_fade(before: Tensor, after: Tensor, dim: int, extent: int) -> Tensor:
    """``after``, with a linear transition from ``before`` over its first ``extent`` px at most."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device) / extent).view(shape)
    tail = before.narrow(dim, before.shape[dim] - extent, extent).float()
    head = after.narrow(dim, 0, extent).float()
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([torch.lerp(tail, head, weight).to(after.dtype), rest], dim=dim)


@dataclass(frozen=True)
class _Run:
    """One encoding or decoding that has to stay within a budget."""

    function: Callable[[Tensor], Tensor]
    images: Tensor  # or latents, [B, C, H, W]
    in_cell: int
    out_cell: int
    cell_bytes: float  # estimated peak per latent cell and sample

    def within(self, budget: float) -> Tensor:
        """The result, in one go if that fits, else sample by sample, else tile by tile."""
        height, width = (side // self.in_cell for side in self.images.shape[-2:])
        sample_bytes = height * width * self.cell_bytes
        try:
            if sample_bytes * len(self.images) <= budget:
                return self.function(self.images)
            axis = self._axis(budget, height, width)
            return torch.cat([self._tiled(sample[None], axis) for sample in self.images])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self._too_big(sample_bytes, budget) from error
            raise

    def _tiled(self, sample_1CHW: Tensor, axis: _Axis) -> Tensor:
        return _run_tiled(self.function, sample_1CHW, (axis, axis), self.in_cell, self.out_cell)

    def _axis(self, budget: float, height: int, width: int) -> _Axis:
        """The largest square tile that fits, overlapping by an eighth."""
        if height * width * self.cell_bytes <= budget:
            return _Axis(max(height, width), max(height, width), full=True)
        tile = math.isqrt(int(budget / self.cell_bytes))
        if tile < _SMALLEST_TILE:
            raise self._too_big(_SMALLEST_TILE**2 * self.cell_bytes, budget)
        return _Axis(tile, tile - max(2, math.ceil(tile / 8)), full=True)

    def _too_big(self, needed: float, budget: float) -> OutOfMemory:
        cell = max(self.in_cell, self.out_cell)
        side = cell * math.isqrt(int(budget / self.cell_bytes)) if math.isfinite(budget) else 0
        return OutOfMemory(
            f"the autoencoder needs about {needed / 2**20:.0f} MiB and may use "
            f"{budget / 2**20:.0f} MiB; what would fit is {side}x{side} px, or free some memory"
        )
