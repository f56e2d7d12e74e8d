"""The ground under the cars: the plane y = a x + b z + c, found in the LiDAR points."""

# N points   T trials

from typing import Final, NamedTuple

import numpy as np

from gesso_core.annotate.geometry import Floats

CAMERA_HEIGHT: Final = 1.65  # metres, of KITTI's car
_INLIER: Final = 0.08  # metres
_STEEPEST: Final = 0.1
_TRIALS, _SAMPLE, _SEED = 200, 3000, 0
_FEWEST: Final = 50
_FITTED_TO: Final = 40.0  # metres of depth; beyond it the road may have left the plane
_AROUND, _FEWEST_AROUND, _HIGHEST_STEP = 8.0, 20, 1.5
_LOWEST_SHARE: Final = 95  # percent of the points around lie above the road


class Ground(NamedTuple):
    """y = a x + b z + c in the rectified camera frame; y grows downwards."""

    a: float = 0.0
    b: float = 0.0
    c: float = CAMERA_HEIGHT
    found: bool = False

    def height(self, points_N3: Floats) -> Floats:
        """Metres above the ground (N,), negative below it."""
        return (
            np.asarray(self.a * points_N3[:, 0] + self.b * points_N3[:, 2] + self.c)
            - (points_N3[:, 1])
        )


def ground_at(ground: Ground, points_rect_N3: Floats, x: float, z: float) -> Ground:
    """The plane to use around this place: moved up or down to the road there, if it is far off.

    Within the plane's own range, and where too few points are around, the plane stays.
    """
    if not ground.found or z < _FITTED_TO:
        return ground
    beside = np.hypot(points_rect_N3[:, 0] - x, points_rect_N3[:, 2] - z) < _AROUND
    below = -ground.height(points_rect_N3[beside])
    below = below[np.abs(below) < _HIGHEST_STEP]
    if len(below) < _FEWEST_AROUND:
        return ground
    return ground._replace(c=ground.c + float(np.percentile(below, _LOWEST_SHARE)))


def find_ground(points_rect_N3: Floats) -> Ground:
    """The plane with most points near it (RANSAC, always the same draws), then least squares.

    Where fewer than 50 points agree the road is taken to be level, as far below as in KITTI.
    """
    x, y, z = points_rect_N3.T
    low = points_rect_N3[(y > 1.0) & (y < 2.6) & (np.abs(x) < 12) & (z > 3) & (z < _FITTED_TO)]
    if len(low) < _FEWEST:
        return Ground()
    rng = np.random.default_rng(_SEED)
    few = low[rng.choice(len(low), min(len(low), _SAMPLE), replace=False)]
    planes = _planes(few, rng)
    if not len(planes):
        return Ground()
    design = np.column_stack([few[:, 0], few[:, 2], np.ones(len(few))])
    errors_TN = np.abs(planes @ design.T - few[:, 1])
    best = planes[(errors_TN < _INLIER).sum(axis=1).argmax()]
    whole = np.column_stack([low[:, 0], low[:, 2], np.ones(len(low))])
    near = np.abs(whole @ best - low[:, 1]) < _INLIER
    if near.sum() < _FEWEST:
        return Ground()
    a, b, c = np.linalg.lstsq(whole[near], low[near, 1], rcond=None)[0]
    return Ground(float(a), float(b), float(c), found=True)


def _planes(points_N3: Floats, rng: np.random.Generator) -> Floats:
    """Planes (T, 3) through three random points each, without the steep ones."""
    triples = points_N3[rng.integers(len(points_N3), size=(_TRIALS, 3))]
    design = np.stack([triples[..., 0], triples[..., 2], np.ones((_TRIALS, 3))], axis=-1)
    solvable = np.abs(np.linalg.det(design)) > 1e-3
    planes = np.linalg.solve(design[solvable], triples[solvable][..., 1:2])[..., 0]
    return np.asarray(planes[(np.abs(planes[:, :2]) < _STEEPEST).all(axis=1)])
