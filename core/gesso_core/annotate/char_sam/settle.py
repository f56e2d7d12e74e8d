"""Which pixels are ink, when colours leave several answers: the one whose pieces look like letters.

On a wall of several colours, or inside a halo, "unlike the background" means little. Every colour
of the word is then tried as the text's: cut into characters, compared with the glyphs of the known
text, and the likeliest is kept. This needs no segmenter and so costs little.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter

from gesso_core.annotate.char_sam.glyphs import FontSet, turned
from gesso_core.annotate.char_sam.ink import Lab, joint_ink
from gesso_core.annotate.char_sam.refine_boxes import refine_boxes
from gesso_core.annotate.char_sam.register import register
from gesso_core.annotate.char_sam.view import WordView
from gesso_core.annotate.masks import Mask

# H, W crop   N pixels   S a sample of them   k colours

GOOD = 0.8  # mean IoU with the glyphs from which the first answer is believed
GAIN = 0.06  # another answer must be this much better,
CLEAR = 0.72  # and look like the text by itself
COLOURS = (2, 3, 5)
AROUND = 4.0  # pixels over which the surroundings of a stroke are averaged
SAMPLE = 20_000  # pixels that the main colours are found from
SHARES = (0.03, 0.75)  # of the polygon, that ink can cover


def settle_ink(view: WordView, clusters: Sequence[str], fonts: FontSet) -> WordView:
    """The view with the ink that looks most like its text."""
    best, ink_HW = likeness(view, view.ink_HW, clusters, fonts), view.ink_HW
    if best is None or best >= GOOD:
        return view
    best = max(best + GAIN, CLEAR)
    for other_HW in _other_inks(view):
        found = likeness(view, other_HW, clusters, fonts)
        if found is not None and found > best:
            best, ink_HW = found, other_HW
    return replace(view, ink_HW=ink_HW)


def likeness(view: WordView, ink_HW: Mask, clusters: Sequence[str], fonts: FontSet) -> float | None:
    """Mean IoU of the ink's pieces with the glyphs they should be; None if no font has any."""
    flat_hw = view.rectangle.sample_mask(ink_HW)
    ious = []
    for segment in refine_boxes(view.rectangle, flat_hw, clusters, fonts):
        templates = turned(fonts.templates(segment.cluster), view.rectangle.downward)
        if templates:
            piece_hw = np.zeros_like(flat_hw)
            columns = slice(int(segment.edges[0]), int(segment.edges[2]))
            piece_hw[:, columns] = flat_hw[:, columns]
            found = register(templates, piece_hw, segment.edges)
            ious.append(found.iou if found is not None else 0.0)
    return float(np.mean(ious)) if ious else None


def _other_inks(view: WordView) -> Iterator[Mask]:
    """Ink by agreement alone, then each of the main colours inside the polygon."""
    yield joint_ink(view.colour.mask_HW, view.word.mask_HW)
    lab = view.lab_HW3[view.inside_HW]
    if len(lab) < 50 or np.ptp(lab, axis=0).max() < 1:
        return
    by_light = lab[np.argsort(lab[:, 0], kind="stable")]
    for count in COLOURS:
        # Starting from evenly spaced lightnesses makes the answer the same every time.
        places = (np.linspace(0.05, 0.95, count) * (len(lab) - 1)).astype(int)
        labels = _main_colours(lab, by_light[places])
        for colour in range(count):
            ink_HW = np.zeros_like(view.inside_HW)
            ink_HW[view.inside_HW] = labels == colour
            if SHARES[0] <= np.mean(labels == colour) <= SHARES[1]:
                yield _to_the_edge(view.lab_HW3, ink_HW) & view.inside_HW


def _to_the_edge(lab_HW3: Lab, ink_HW: Mask) -> Mask:
    """The ink and those of its neighbours that are more like it than like what is around.

    A colour by itself loses the blend at the edge of each stroke.
    """
    away_HW = (~binary_dilation(ink_HW, iterations=2)).astype(np.float32)
    weight_HW = gaussian_filter(away_HW, AROUND) + 1e-6
    around_HW3 = gaussian_filter(lab_HW3 * away_HW[..., None], (AROUND, AROUND, 0))
    around_HW3 /= weight_HW[..., None]
    text_3 = np.median(lab_HW3[ink_HW], axis=0)
    like_HW = np.square(lab_HW3 - text_3).sum(-1) < np.square(lab_HW3 - around_HW3).sum(-1)
    edge_HW: Mask = ink_HW | (binary_dilation(ink_HW) & like_HW)
    return edge_HW


def _main_colours(
    points_N3: NDArray[np.float32], centres_k3: NDArray[np.float32], rounds: int = 8
) -> NDArray[np.int64]:
    """k-means by Lloyd's rule: the centre of each point. A centre that loses all points stays."""
    sample_S3 = points_N3[:: max(1, len(points_N3) // SAMPLE)]
    for _ in range(rounds):
        labels_S = _nearest(sample_S3, centres_k3)
        centres_k3 = np.stack(
            [
                sample_S3[labels_S == k].mean(0) if (labels_S == k).any() else centre
                for k, centre in enumerate(centres_k3)
            ]
        )
    return _nearest(points_N3, centres_k3)


def _nearest(points_N3: NDArray[np.float32], centres_k3: NDArray[np.float32]) -> NDArray[np.int64]:
    away_kN = np.stack([np.square(points_N3 - centre).sum(1) for centre in centres_k3])
    nearest_N: NDArray[np.int64] = away_kN.argmin(0)
    return nearest_N
