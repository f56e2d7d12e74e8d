"""Average precision by KITTI's protocol: 40 recall points, three difficulties, ignored regions.

Percentages. A match needs an overlap *above* the threshold. With fewer than 41 valid objects even
a perfect detector stays below 100 in AP40 (at most (N - 1) / 40): on small sets count recalls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.kitti.boxes import bev_iou, iou_2d, iou_3d
from gesso_core.annotate.kitti.labels import UNKNOWN_ALPHA, KittiObject, boxes2d, boxes3d
from gesso_core.errors import InvalidRequest

Metric = Literal["image", "bev", "3d"]
Frame = Sequence[KittiObject]
RECALL_POINTS = 40
# Ground truth of the neighbour class is ignored: to find one neither gains nor costs.
NEIGHBOURS = {"car": "van", "pedestrian": "person_sitting"}


@dataclass(frozen=True)
class Difficulty:
    """Which ground truths count: taller than, and at most this occluded and truncated."""

    name: str
    min_height: int  # pixels
    max_occlusion: int
    max_truncation: float


DIFFICULTIES = (
    Difficulty("easy", 40, 0, 0.15),
    Difficulty("moderate", 25, 1, 0.30),
    Difficulty("hard", 25, 2, 0.50),
)


@dataclass(frozen=True)
class AveragePrecision:
    """Percent. ``aos40`` is None where a detection leaves its alpha out."""

    difficulty: str
    truths: int
    ap40: float
    ap11: float
    aos40: float | None


class _Roles(NamedTuple):
    """What counts in one frame at one difficulty: 0 valid, 1 ignored, -1 not of concern."""

    truths: list[int]
    detections: list[int]


@dataclass(frozen=True)
class _Overlaps:
    """Per ground truth the detections above the threshold, as (index, overlap) in file order."""

    candidates: list[list[tuple[int, float]]]
    scores: list[float]
    similarity: NDArray[np.float64]  # (truths, detections): (1 + cos of the alpha difference) / 2
    dont_care: list[bool]  # detections that lie in a region nobody labelled


class _Counts(NamedTuple):
    true: int
    false: int
    missed: int
    similarity: float
    matched_scores: list[float]


def evaluate(
    truths: Sequence[Frame],
    detections: Sequence[Frame],
    *,
    kind: str = "Car",
    metric: Metric = "3d",
    min_overlap: float = 0.7,
) -> tuple[AveragePrecision, ...]:
    """AP of one class over the frames, easy, moderate and hard.

    Args:
        truths, detections: the objects of each frame, in the same order; detections have scores.
        kind: the class, in any case.
        metric: overlap in the picture, of the ground rectangles, or of the volumes.
        min_overlap: what a match must exceed, 0..1.

    Raises:
        InvalidRequest: lists of different length, or a detection without a score.
    """
    if len(truths) != len(detections):
        raise InvalidRequest(
            f"{len(truths)} frames of ground truth, but {len(detections)} of detections",
            field="detections",
        )
    frames = list(zip(truths, detections, strict=True))
    overlaps = [_overlaps(t, d, kind, metric, min_overlap) for t, d in frames]
    oriented = all(d.alpha != UNKNOWN_ALPHA for frame in detections for d in frame)
    return tuple(_score(level, frames, overlaps, kind, oriented) for level in DIFFICULTIES)


def _score(
    level: Difficulty,
    frames: Sequence[tuple[Frame, Frame]],
    overlaps: Sequence[_Overlaps],
    kind: str,
    oriented: bool,
) -> AveragePrecision:
    roles = [_roles(t, d, kind, level) for t, d in frames]
    pairs = list(zip(roles, overlaps, strict=True))
    valid = sum(role.truths.count(0) for role in roles)
    matched = [s for r, o in pairs for s in _match(r, o, -math.inf, by_score=True).matched_scores]
    precision, similarity = np.zeros((2, RECALL_POINTS + 1))
    for k, threshold in enumerate(_thresholds(matched, valid)):
        counts = [_match(r, o, threshold, by_score=False) for r, o in pairs]
        found = sum(c.true for c in counts)
        claimed = found + sum(c.false for c in counts)
        if claimed:
            precision[k] = found / claimed
            similarity[k] = sum(c.similarity for c in counts) / claimed
    precision, similarity = _from_the_right(precision), _from_the_right(similarity)
    return AveragePrecision(
        difficulty=level.name,
        truths=valid,
        ap40=100 * float(precision[1:].mean()),
        ap11=100 * float(precision[::4].mean()),
        aos40=100 * float(similarity[1:].mean()) if oriented else None,
    )


def _from_the_right(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each entry becomes the largest of itself and all later ones."""
    return np.asarray(np.maximum.accumulate(values[::-1])[::-1])


def _roles(truths: Frame, detections: Frame, kind: str, level: Difficulty) -> _Roles:
    return _Roles(
        [_role_of_truth(t, kind.lower(), level) for t in truths],
        [_role_of_detection(d, kind.lower(), level) for d in detections],
    )


def _role_of_truth(item: KittiObject, kind: str, level: Difficulty) -> int:
    name = item.kind.lower()
    if name not in (kind, NEIGHBOURS.get(kind)):
        return -1
    counts = (
        name == kind
        and item.box2d[3] - item.box2d[1] > level.min_height
        and item.occluded <= level.max_occlusion
        and item.truncated <= level.max_truncation
    )
    return 0 if counts else 1


def _role_of_detection(item: KittiObject, kind: str, level: Difficulty) -> int:
    # The height is cut to whole pixels, and asked before the class: so the official code does.
    if int(item.box2d[3] - item.box2d[1]) < level.min_height:
        return 1
    return 0 if item.kind.lower() == kind else -1


def _overlaps(
    truths: Frame, detections: Frame, kind: str, metric: Metric, min_overlap: float
) -> _Overlaps:
    scores = [d.score for d in detections]
    if None in scores:
        raise InvalidRequest("a detection has no score: 16 columns are needed", field="detections")
    if metric == "image":
        overlap_TD = iou_2d(boxes2d(truths), boxes2d(detections))
    else:
        overlap_TD = {"bev": bev_iou, "3d": iou_3d}[metric](boxes3d(truths), boxes3d(detections))
    alphas = (np.array([o.alpha for o in side]) for side in (truths, detections))
    difference = np.subtract.outer(*alphas)
    return _Overlaps(
        candidates=[
            [(int(d), float(row[d])) for d in np.flatnonzero(row > min_overlap)]
            for row in overlap_TD
        ],
        scores=[s for s in scores if s is not None],
        similarity=(1 + np.cos(difference)) / 2,
        dont_care=_in_dont_care(truths, detections, min_overlap)
        if metric == "image"
        else [False] * len(scores),
    )


def _in_dont_care(truths: Frame, detections: Frame, min_overlap: float) -> list[bool]:
    regions = boxes2d(t for t in truths if t.is_dont_care)
    covered = iou_2d(boxes2d(detections), regions, of_first=True) > min_overlap
    return [bool(row.any()) for row in covered]


def _match(roles: _Roles, overlaps: _Overlaps, threshold: float, *, by_score: bool) -> _Counts:
    """Hand each ground truth, in file order, the best detection that is left.

    The best is that of the highest score (to find the thresholds), or that of the largest overlap,
    valid ones first (to count at a threshold).
    """
    taken: set[int] = set()
    similarity, missed, matched = 0.0, 0, []
    for t, role in enumerate(roles.truths):
        if role < 0:
            continue
        left = [
            (d, overlap)
            for d, overlap in overlaps.candidates[t]
            if d not in taken and roles.detections[d] >= 0 and overlaps.scores[d] >= threshold
        ]
        if not left:
            missed += role == 0
            continue
        best = _best(left, roles, overlaps, by_score)
        taken.add(best)
        if role == 0 and roles.detections[best] == 0:
            matched.append(overlaps.scores[best])
            similarity += float(overlaps.similarity[t, best])
    false = sum(
        d not in taken and role == 0 and score >= threshold and not unlabelled
        for d, (role, score, unlabelled) in enumerate(
            zip(roles.detections, overlaps.scores, overlaps.dont_care, strict=True)
        )
    )
    return _Counts(len(matched), false, missed, similarity, matched)


def _best(left: list[tuple[int, float]], roles: _Roles, overlaps: _Overlaps, by_score: bool) -> int:
    if by_score:
        return max(left, key=lambda pair: overlaps.scores[pair[0]])[0]
    valid = [pair for pair in left if roles.detections[pair[0]] == 0]
    # Among ignored detections the first is as good as any: none of them counts.
    return max(valid, key=lambda pair: pair[1])[0] if valid else left[0][0]


def _thresholds(scores: list[float], valid: int) -> list[float]:
    """At most 41 scores whose recalls lie closest to 0, 1/40, 2/40, ..."""
    ordered = sorted(scores, reverse=True)
    chosen, recall = [], 0.0
    for i, score in enumerate(ordered):
        last = i == len(ordered) - 1
        here, after = (i + 1) / valid, (i + 1 if last else i + 2) / valid
        if after - recall < recall - here and not last:
            continue
        chosen.append(score)
        recall += 1 / RECALL_POINTS
    return chosen
