"""Upright 3D boxes: corners, projections, points inside, rotated overlap.

A box is (h, w, l, x, y, z, ry) in the rectified camera frame: (x, y, z) is the centre of the bottom
face and y grows downwards, so it spans [y - h, y]. At ry = 0 its length lies along +x; the heading
is (cos ry, 0, -sin ry). Lengths in metres, angles in radians, everything float64.
"""

# N, M boxes   P points

import math

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.kitti.calibration import Calibration

# The bottom face, then the same four corners of the top face: signs of l/2, share of -h, of w/2.
_CORNERS_83 = np.array(
    [
        (sx, top, sz)
        for top in (0, -1)
        for sx, sz in ((0.5, 0.5), (0.5, -0.5), (-0.5, -0.5), (-0.5, 0.5))
    ]
)
BOX_EDGES = (
    *((i, (i + 1) % 4) for i in range(4)),
    *((i + 4, (i + 1) % 4 + 4) for i in range(4)),
    *((i, i + 4) for i in range(4)),
)


def wrap_angle(angle: ArrayLike) -> Floats:
    """The same angle in [-pi, pi)."""
    return np.asarray((np.asarray(angle, dtype=np.float64) + math.pi) % (2 * math.pi) - math.pi)


def corners(boxes_N7: ArrayLike) -> Floats:
    """Corners (N, 8, 3): bottom face (+l, +w), (+l, -w), (-l, -w), (-l, +w), then the top face."""
    h, w, length, x, y, z, ry = _columns(boxes_N7)
    local = _CORNERS_83[None] * np.stack([length, h, w], axis=1)[:, None]
    return rotate_y(local, ry) + np.stack([x, y, z], axis=1)[:, None]


def rotate_y(points_NP3: Floats, angle_N: Floats) -> Floats:
    """R_y(angle) of each group of points: from a box's own axes to the camera's."""
    c, s = np.cos(angle_N)[:, None], np.sin(angle_N)[:, None]
    x, y, z = points_NP3[..., 0], points_NP3[..., 1], points_NP3[..., 2]
    return np.stack([c * x + s * z, y, c * z - s * x], axis=-1)


def observation_angle(boxes_N7: ArrayLike) -> Floats:
    """alpha (N,) in [-pi, pi): the heading as seen along the viewing ray."""
    _, _, _, x, _, z, ry = _columns(boxes_N7)
    return wrap_angle(ry - np.arctan2(x, z))


def projected_box(boxes_N7: ArrayLike, calibration: Calibration) -> Floats:
    """Smallest picture box (N, 4) around the projected corners; not clipped to the picture."""
    uv = projected_corners(boxes_N7, calibration)
    return np.concatenate([uv.min(axis=1), uv.max(axis=1)], axis=1)


def projected_corners(boxes_N7: ArrayLike, calibration: Calibration) -> Floats:
    """Pixels of the corners, (N, 8, 2); formal for corners behind the camera."""
    uv, _ = calibration.project(corners(boxes_N7).reshape(-1, 3))
    return uv.reshape(-1, 8, 2)


def points_in_boxes(points_rect_P3: ArrayLike, boxes_N7: ArrayLike) -> NDArray[np.bool_]:
    """Which point lies in which box, faces included, (P, N)."""
    points = np.asarray(points_rect_P3, dtype=np.float64)
    h, w, length, x, y, z, ry = _columns(boxes_N7)
    dx, dy, dz = (points[:, i, None] - c for i, c in enumerate((x, y, z)))
    c, s = np.cos(ry), np.sin(ry)
    along, across = c * dx - s * dz, s * dx + c * dz
    inside = (np.abs(along) <= length / 2) & (np.abs(across) <= w / 2)
    return np.asarray(inside & (dy <= 0) & (dy >= -h))


def bev_iou(a_N7: ArrayLike, b_M7: ArrayLike) -> Floats:
    """Overlap of the ground rectangles, (N, M)."""
    shared, area_a, area_b = _ground_overlap(a_N7, b_M7)
    return _ratio(shared, area_a[:, None] + area_b[None] - shared)


def iou_3d(a_N7: ArrayLike, b_M7: ArrayLike) -> Floats:
    """Overlap of the volumes, (N, M)."""
    shared_area, area_a, area_b = _ground_overlap(a_N7, b_M7)
    (h_a, _, _, _, y_a, _, _), (h_b, _, _, _, y_b, _, _) = _columns(a_N7), _columns(b_M7)
    bottom = np.minimum(y_a[:, None], y_b[None])
    top = np.maximum((y_a - h_a)[:, None], (y_b - h_b)[None])
    shared = shared_area * np.maximum(bottom - top, 0)
    return _ratio(shared, (area_a * h_a)[:, None] + (area_b * h_b)[None] - shared)


def iou_2d(a_N4: ArrayLike, b_M4: ArrayLike, *, of_first: bool = False) -> Floats:
    """Overlap of picture boxes, (N, M): over the union, or over the first box's area."""
    a, b = (np.asarray(x, dtype=np.float64).reshape(-1, 4) for x in (a_N4, b_M4))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    whole = area_a[:, None] + 0 * shared if of_first else area_a[:, None] + area_b[None] - shared
    return _ratio(shared, whole)


def _columns(boxes_N7: ArrayLike) -> tuple[Floats, ...]:
    return tuple(np.asarray(boxes_N7, dtype=np.float64).reshape(-1, 7).T)


def _ground_overlap(a_N7: ArrayLike, b_M7: ArrayLike) -> tuple[Floats, Floats, Floats]:
    a, b = (shapely.polygons(corners(x)[:, :4, ::2]) for x in (a_N7, b_M7))
    shared = shapely.area(shapely.intersection(a[:, None], b[None, :]))
    return shared, shapely.area(a), shapely.area(b)


def _ratio(shared: Floats, whole: Floats) -> Floats:
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
