"""Forced alignment: where in a recogniser's output each character of a known text was read.

Viterbi over the CTC graph blank, c1, blank, c2, ..., blank: from frame to frame a path stays, moves
one state on, or leaps over a blank between two different labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Floats
from gesso_core.errors import InvalidRequest

# T frames   C classes   L labels   S states, 2 L + 1


@dataclass(frozen=True, eq=False)
class Alignment:
    """The best single path.

    Attributes:
        score: its log-probability.
        path_T: the class of each frame.
        spans_L2: first frame and last frame + 1 of each label, blanks excluded.
    """

    score: float
    path_T: NDArray[np.int64]
    spans_L2: NDArray[np.int64]


def align(log_probs_TC: Floats, labels: Sequence[int], *, blank: int = 0) -> Alignment:
    """Align the labels; raises InvalidRequest when the frames cannot hold them all."""
    frames = len(log_probs_TC)
    needed = len(labels) + sum(a == b for a, b in pairwise(labels))
    if frames < needed or not labels:
        raise InvalidRequest(
            f"{len(labels)} characters need {max(needed, 1)} frames, the recogniser gave {frames}",
            field="text",
        )
    classes_S = np.full(2 * len(labels) + 1, blank)
    classes_S[1::2] = labels
    states_T, score = _viterbi(log_probs_TC[:, classes_S], classes_S, blank)
    spans = [
        (int(frame[0]), int(frame[-1]) + 1)
        for frame in (np.flatnonzero(states_T == 2 * k + 1) for k in range(len(labels)))
    ]
    return Alignment(score, classes_S[states_T].astype(np.int64), np.array(spans, dtype=np.int64))


def _viterbi(
    emitted_TS: Floats, classes_S: NDArray[np.int64], blank: int
) -> tuple[NDArray[np.int64], float]:
    frames, states = emitted_TS.shape
    may_leap = np.zeros(states, dtype=bool)
    may_leap[2:] = (classes_S[2:] != blank) & (classes_S[2:] != classes_S[:-2])
    score = np.full(states, -np.inf)
    score[:2] = emitted_TS[0, :2]
    steps_TS = np.zeros((frames, states), dtype=np.int64)
    for frame in range(1, frames):
        moved = np.concatenate([[-np.inf], score[:-1]])
        leapt = np.where(
            may_leap, np.concatenate([[-np.inf, -np.inf], score[:-2]])[:states], -np.inf
        )
        choices = np.stack([score, moved, leapt])
        steps_TS[frame] = choices.argmax(0)
        score = choices.max(0) + emitted_TS[frame]
    state = states - 1 if score[-1] >= score[-2] else states - 2
    best = float(score[state])
    path = np.empty(frames, dtype=np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(steps_TS[frame, state])
    return path, best
