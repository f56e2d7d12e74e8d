"""The way of pictures and prompts into SAM's square frame, and of logits back to the picture.

The longest edge is resized to the frame (1024 px), colours are normalised, and only then zeros are
added at the right and at the bottom. Back: the logits are stretched over the frame, the padding is
cut off, and the rest is stretched to the picture, bilinearly both times. SAM 2 has no padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gesso_core.annotate.geometry import Floats32
from gesso_core.pipelines.pictures import Pixels

# H, W picture   E edge of the frame   L side of the low-resolution logits   N points

Color = tuple[float, float, float]
IMAGENET_MEAN: Final[Color] = (0.485, 0.456, 0.406)
IMAGENET_STD: Final[Color] = (0.229, 0.224, 0.225)
BAND: Final = 64  # rows or columns of a picture whose logits are made together
ROUNDING: Final = 1e-3  # what resized logits may exceed their neighbours by


@dataclass(frozen=True)
class Frame:
    """How one picture lies in the frame of a model.

    Attributes:
        edge: side of the square frame.
        size: (H, W) of the picture.
        resized: (h, w) that the picture takes up at the top left of the frame.
        through_frame: logits are stretched to the frame first, and from there to the picture.
    """

    edge: int
    size: tuple[int, int]
    resized: tuple[int, int]
    through_frame: bool = True

    def points(self, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Picture pixels (x, y) as frame pixels; each axis has its own factor."""
        (height, width), (new_height, new_width) = self.size, self.resized
        factors = np.array([new_width / width, new_height / height])
        moved: NDArray[np.float64] = points_N2 * factors
        return moved

    def boxes(self, boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes (x0, y0, x1, y1), likewise."""
        return self.points(boxes_N4.reshape(-1, 2)).reshape(-1, 4)

    def picture_logits(self, low_res_NLL: Tensor) -> Tensor:
        """Low-resolution logits (N, L, L) at the picture's size, (N, H, W)."""
        bands = [logits_NhW for _, _, logits_NhW in self.bands(low_res_NLL, above=-math.inf)]
        return torch.cat(bands, dim=-2)

    def bands(self, low_res_NLL: Tensor, *, above: float) -> Iterator[tuple[slice, slice, Tensor]]:
        """The same, a few rows of the picture after the other: rows, columns and (N, h, w).

        All resizing, and the cut of the padding, is linear along each axis, so that each axis is
        one matrix and the frame itself is never filled. A row of it reads two or three neighbours,
        so that a few rows together are a small matrix. Resizing never exceeds what it reads: around
        the logits that are ``above`` there may be margins that are not, and these are left out.
        """
        side = low_res_NLL.shape[-1]
        edge = self.edge if self.through_frame else side
        all_rows, all_columns = (
            _stretch(side, edge, kept if self.through_frame else side, wanted)
            for kept, wanted in zip(self.resized, self.size, strict=True)
        )
        seen_Nll = low_res_NLL[..., : all_rows[-1].read.stop, : all_columns[-1].read.stop]
        reached_ll = (seen_Nll > above - ROUNDING).view(-1, *seen_Nll.shape[-2:]).any(dim=0)
        rows = _reached(all_rows, reached_ll.any(dim=1))
        columns = _reached(all_columns, reached_ll.any(dim=0))
        if not rows or not columns:
            return
        width = slice(columns[0].made.start, columns[-1].made.stop)
        wide_NLw = torch.cat([low_res_NLL[..., part.read] @ part.matrix.mT for part in columns], -1)
        for part in rows:
            yield part.made, width, part.matrix @ wide_NLw[..., part.read, :]


def long_edge_frame(size: tuple[int, int], edge: int) -> Frame:
    """The frame of SAM: proportions are kept, the longest side fills the edge."""
    scale = edge / max(size)
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return Frame(edge, size, (height, width))


def square_frame(size: tuple[int, int], edge: int) -> Frame:
    """The frame of SAM 2: the picture is stretched over the whole square, logits come straight."""
    return Frame(edge, size, (edge, edge), through_frame=False)


def pixel_values(
    picture_HW3: Pixels, frame: Frame, mean: Color = IMAGENET_MEAN, std: Color = IMAGENET_STD
) -> Floats32:
    """The picture as a model reads it: (3, E, E) float32, normalised, zeros as padding."""
    height, width = frame.resized
    resized = Image.fromarray(picture_HW3).resize((width, height), Image.Resampling.BILINEAR)
    colours_hw3 = np.asarray(resized, dtype=np.float32) / np.float32(255)
    filled_3EE = np.zeros((3, frame.edge, frame.edge), dtype=np.float32)
    normal_hw3 = (colours_hw3 - np.array(mean, np.float32)) / np.array(std, np.float32)
    filled_3EE[:, :height, :width] = normal_hw3.transpose(2, 0, 1)
    return filled_3EE


@dataclass(frozen=True)
class _Part:
    """Some numbers of an axis, ``made`` from those ``read`` by a matrix."""

    made: slice
    read: slice
    matrix: Tensor


@lru_cache(maxsize=16)
def _stretch(low: int, edge: int, kept: int, wanted: int) -> tuple[_Part, ...]:
    """Bilinear low → edge, the first ``kept`` of it, bilinear kept → wanted, in parts."""
    frame = _bilinear(torch.eye(low, dtype=torch.float64), edge)
    whole = _bilinear(frame[:kept], wanted).float()
    parts = []
    for start in range(0, wanted, BAND):
        made = slice(start, min(start + BAND, wanted))
        used = whole[made].any(dim=0).nonzero()
        read = slice(int(used[0]), int(used[-1]) + 1)
        parts.append(_Part(made, read, whole[made, read].contiguous()))
    return tuple(parts)


def _reached(parts: Sequence[_Part], reached_L: Tensor) -> Sequence[_Part]:
    """The parts from the first to the last that read what is reached."""
    places = reached_L.nonzero()
    if not len(places):
        return ()
    first, last = int(places[0]), int(places[-1])
    return [part for part in parts if part.read.start <= last and part.read.stop > first]


def _bilinear(given_NC: Tensor, wanted: int) -> Tensor:
    """Rows interpolated linearly between pixel centres, the outermost repeated: (wanted, C)."""
    given = len(given_NC)
    place = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5).clamp(min=0)
    left = place.long().clamp(max=given - 1)
    right = (left + 1).clamp(max=given - 1)
    share = (place - left)[:, None]
    return (1 - share) * given_NC[left] + share * given_NC[right]
