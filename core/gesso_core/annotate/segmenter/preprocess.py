"""The way of pictures and prompts into SAM's square frame, and of logits back to the picture.

The longest edge is resized to the frame (1024 px), colours are normalised, and only then zeros are
added at the right and at the bottom. Back: the logits are stretched over the frame, the padding is
cut off, and the rest is stretched to the picture, bilinearly both times. SAM 2 has no padding.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gesso_core.annotate.segmenter.contract import Floats
from gesso_core.pipelines.pictures import Pixels

# H, W picture   E edge of the frame   L side of the low-resolution logits   N points

Color = tuple[float, float, float]
IMAGENET_MEAN: Final[Color] = (0.485, 0.456, 0.406)
IMAGENET_STD: Final[Color] = (0.229, 0.224, 0.225)


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
        """Low-resolution logits (N, L, L) at the picture's size, (N, H, W).

        All resizing, and the cut of the padding, is linear along each axis, so that each axis is
        one small matrix and the frame itself is never filled.
        """
        side = low_res_NLL.shape[-1]
        edge = self.edge if self.through_frame else side
        rows_HL, columns_WL = (
            _stretch(side, edge, kept if self.through_frame else side, wanted)
            for kept, wanted in zip(self.resized, self.size, strict=True)
        )
        return rows_HL @ low_res_NLL @ columns_WL.mT


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
) -> Floats:
    """The picture as a model reads it: (3, E, E) float32, normalised, zeros as padding."""
    height, width = frame.resized
    resized = Image.fromarray(picture_HW3).resize((width, height), Image.Resampling.BILINEAR)
    colours_hw3 = np.asarray(resized, dtype=np.float32) / np.float32(255)
    filled_3EE = np.zeros((3, frame.edge, frame.edge), dtype=np.float32)
    normal_hw3 = (colours_hw3 - np.array(mean, np.float32)) / np.array(std, np.float32)
    filled_3EE[:, :height, :width] = normal_hw3.transpose(2, 0, 1)
    return filled_3EE


@lru_cache(maxsize=16)
def _stretch(low: int, edge: int, kept: int, wanted: int) -> Tensor:
    """Bilinear low → edge, the first ``kept`` of it, bilinear kept → wanted: (wanted, low)."""
    frame = _bilinear(torch.eye(low, dtype=torch.float64), edge)
    return _bilinear(frame[:kept], wanted).float()


def _bilinear(given_NC: Tensor, wanted: int) -> Tensor:
    """Rows interpolated linearly between pixel centres, the outermost repeated: (wanted, C)."""
    given = len(given_NC)
    place = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5).clamp(min=0)
    left = place.long().clamp(max=given - 1)
    right = (left + 1).clamp(max=given - 1)
    share = (place - left)[:, None]
    return (1 - share) * given_NC[left] + share * given_NC[right]
