"""What a recogniser has to say about a known text: where its characters stand, and how many.

Its columns only pull the cuts. As boxes they would be bad: a network reads a character somewhere in
the middle, not at its edges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.char_sam.ctc import align
from gesso_core.annotate.char_sam.graphemes import visual_order
from gesso_core.annotate.char_sam.ocr import TextReader
from gesso_core.annotate.char_sam.view import WordView

# T frames   C classes   n characters

SURE = math.log(0.3)  # mean log-probability of the characters above which the vote counts


@dataclass(frozen=True, eq=False)
class Vote:
    """What the recogniser saw, in columns of the flat word; None when it is not sure.

    Attributes:
        borders_n: n + 1 columns between the characters, the first and last at the word's ends.
        spans_n2: first and last column where each character was read.
        other_length: the recogniser reads another number of characters than the text has.
    """

    borders_n: NDArray[np.float64] | None
    spans_n2: NDArray[np.float64] | None
    other_length: bool


def vote(view: WordView, clusters: Sequence[str], reader: TextReader) -> Vote | None:
    """Ask the recogniser; None for words it cannot read: downwards, right to left."""
    if view.rectangle.downward:
        return None
    said = vote_on_strip(_strip(view), clusters, reader)
    if said is None or said.borders_n is None or said.spans_n2 is None:
        return said
    margin = view.rectangle.margin
    return Vote(said.borders_n + margin, said.spans_n2 + margin, said.other_length)


def vote_on_strip(
    strip_hw3: NDArray[np.uint8], clusters: Sequence[str], reader: TextReader
) -> Vote | None:
    """The vote in columns of a flat word; None for text that does not run left to right."""
    if visual_order(list(clusters)) != list(range(len(clusters))):
        return None
    log_probs_TC = reader.log_probs(strip_hw3)
    visible = sum(not cluster.isspace() for cluster in clusters)
    other_length = _greedy_length(log_probs_TC, reader.alphabet) != visible
    classes = {character: number for number, character in enumerate(reader.alphabet) if number}
    if any(cluster not in classes for cluster in clusters):
        return Vote(None, None, False)
    labels = [classes[cluster] for cluster in clusters]
    repeated = sum(a == b for a, b in pairwise(labels))
    if len(labels) + repeated > len(log_probs_TC):
        return Vote(None, None, other_length)
    spans_L2 = align(log_probs_TC, labels).spans_L2
    best = [
        float(log_probs_TC[first:last, label].max())
        for (first, last), label in zip(spans_L2, labels, strict=True)
    ]
    if float(np.mean(best)) < SURE:
        return Vote(None, None, other_length)
    columns = float(strip_hw3.shape[1])
    spans_n2 = np.asarray(spans_L2 * (columns / len(log_probs_TC)), np.float64)
    between = (spans_n2[:-1, 1] + spans_n2[1:, 0]) / 2
    return Vote(np.concatenate([[0.0], between, [columns]]), spans_n2, other_length)


def _strip(view: WordView) -> NDArray[np.uint8]:
    """The word's pixels, laid out flat without margins."""
    margin = view.rectangle.margin
    channels = [view.rectangle.sample(view.crop_HW3[..., c].astype(float)) for c in range(3)]
    flat = np.stack(channels, -1)[margin:-margin, margin:-margin]
    return np.ascontiguousarray(flat.round().clip(0, 255).astype(np.uint8))


def _greedy_length(log_probs_TC: NDArray[np.float64], alphabet: Sequence[str]) -> int:
    """How many visible characters the likeliest path spells."""
    path_T = log_probs_TC.argmax(1)
    starts = np.concatenate([[True], path_T[1:] != path_T[:-1]])
    return sum(1 for label in path_T[starts & (path_T > 0)] if not alphabet[label].isspace())
