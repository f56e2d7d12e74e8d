"""Which pixels of a word are ink: by their colour, by the segmenter, by both.

Neither is good enough alone: colour takes panels and shadows for ink, the segmenter fills the gaps
between strokes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

from gesso_core.annotate.masks import Mask
from gesso_core.pipelines.pictures import Pixels

# H, W a crop of the picture

Lab = NDArray[np.float32]

RING = 0.25  # width of the ring around the polygon, of the word's height
KEPT = 0.25  # colour and segmenter together must keep this share of the colour's ink
FEWEST = 8  # pixels to take a colour from
AGREED = 0.5  # share of the seed that its own colour must keep


@dataclass(frozen=True, eq=False)
class Ink:
    """Colour distances from the background, and the pixels far enough to be ink."""

    distance_HW: NDArray[np.floating]
    mask_HW: Mask
    threshold: float


def to_lab(picture_HW3: Pixels) -> Lab:
    """The picture in CIELAB, where distances are what an eye sees."""
    # skimage keeps float32, at half the memory of its default.
    lab_HW3: Lab = rgb2lab(picture_HW3.astype(np.float32) / 255)
    return lab_HW3


def colour_ink(lab_HW3: Lab, inside_HW: Mask, *, height: float) -> Ink:
    """Ink by colour: unlike the ring just outside the word, by Otsu's threshold inside it.

    Args:
        lab_HW3: the crop, see `to_lab`.
        inside_HW: the word's polygon.
        height: of the word in pixels; the ring's width follows it.
    """
    away = distance_transform_edt(~inside_HW)
    ring_HW = (away > 0) & (away <= max(2.0, RING * height))
    if not ring_HW.any():  # the word fills the picture
        ring_HW = inside_HW
    background_3 = np.median(lab_HW3[ring_HW], axis=0)
    distance_HW = np.linalg.norm(lab_HW3 - background_3, axis=-1)
    values = distance_HW[inside_HW]
    threshold = float(threshold_otsu(values)) if np.ptp(values) > 1e-6 else float("inf")
    return Ink(distance_HW, inside_HW & (distance_HW > threshold), threshold)


def joint_ink(colour_HW: Mask, segmented_HW: Mask) -> Mask:
    """Ink that both agree on, or the colour's alone where they hardly agree at all."""
    both = colour_HW & segmented_HW
    return both if both.sum() >= KEPT * colour_HW.sum() else colour_HW


def text_colour_ink(lab_HW3: Lab, inside_HW: Mask, colour_HW: Mask, seed_HW: Mask) -> Mask:
    """Ink that is unlike the background and like the text.

    The text's colour is the median of ``seed_HW``; Otsu's threshold on the distance from it splits
    the word. Where hardly anything is left the median was of something else, and the seed stands.
    """
    if seed_HW.sum() < FEWEST:
        return seed_HW
    distance_HW = np.linalg.norm(lab_HW3 - np.median(lab_HW3[seed_HW], axis=0), axis=-1)
    values = distance_HW[inside_HW]
    if np.ptp(values) < 1e-6:
        return seed_HW
    ink_HW: Mask = colour_HW & (distance_HW < threshold_otsu(values))
    return ink_HW if ink_HW.sum() >= AGREED * seed_HW.sum() else seed_HW
