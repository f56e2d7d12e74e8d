"""From a mask and a LiDAR scan to the object's own points and the poses to start fitting from."""

# N points   S start poses

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.slf.ground import Ground
from gesso_core.errors import InvalidRequest

YAWS: Final = 8  # over half a turn: front and back look nearly alike
FEW_POINTS: Final = 5
_ERODED_FROM: Final = 600  # pixels; smaller masks have none to spare
_ABOVE_GROUND: Final = 0.12  # metres
_CELL: Final = 0.1
_MOST_CELLS, _LARGE_CELL = 10_000, 0.4  # beyond so many cells, larger ones: in links
_LINK, _FAR_LINK, _FAR = 0.7, 1.1, 25.0  # metres: neighbours of a cluster, and beyond which depth
_CORE: Final = 3  # points within the link that make a point part of a cluster's core
_NEAR_SHARE: Final = 15  # percent
_USUAL_HEIGHT: Final = 1.5
_BELIEVED: Final = (0.65, 1.5)  # depths, as shares of the guess from the mask's height
_HIGHEST: Final = 3.0  # metres above the ground for the middle of a car's points
_FARTHEST: Final = 120.0


class Starts(NamedTuple):
    """Places on the ground and headings to begin from."""

    position_S3: Floats
    yaws_S: Floats


def points_in_mask(
    points_rect_N3: Floats, mask_HW: Mask, calibration: Calibration
) -> NDArray[np.intp]:
    """Indices of the points that project into the mask, without its outermost pixels."""
    height, width = mask_HW.shape
    seen = np.flatnonzero(calibration.in_image(points_rect_N3, width, height))
    u, v = calibration.project(points_rect_N3[seen])[0].astype(int).T
    inside = mask_HW[v, u]
    if mask_HW.sum() > _ERODED_FROM:
        framed = np.pad(mask_HW, 1)  # so that (u, v) stands at (u + 1, v + 1)
        inside &= framed[v, u + 1] & framed[v + 2, u + 1] & framed[v + 1, u] & framed[v + 1, u + 2]
    return np.asarray(seen[inside])


def raised_points(
    points_rect_N3: Floats, mask_HW: Mask, calibration: Calibration, ground: Ground
) -> Floats:
    """The scan's points in the mask that do not lie on the ground."""
    points = points_rect_N3[points_in_mask(points_rect_N3, mask_HW, calibration)]
    return np.asarray(points[ground.height(points) > _ABOVE_GROUND])


def object_points(
    points_rect_N3: Floats, mask_HW: Mask, calibration: Calibration, ground: Ground
) -> Floats:
    """The scan's points on the object: in its mask, above the ground, of the largest cluster."""
    points = largest_cluster(raised_points(points_rect_N3, mask_HW, calibration, ground))
    if len(points) >= FEW_POINTS:
        return points
    # So few may as well be of the background: they must lie where the mask's height puts a car.
    guess = calibration.focal * _USUAL_HEIGHT / _rows_of(mask_HW)
    low, high = _BELIEVED
    return points[(points[:, 2] > low * guess) & (points[:, 2] < high * guess)]


def largest_cluster(points_N3: Floats) -> Floats:
    """The largest group of points that are neighbours on the ground plane (DBSCAN).

    Drops what was seen through windows, and what a mask took of the background. Points that have
    fewer than two neighbours are kept only where there is no group at all.

    Whole cells of 0.1 m are linked instead of single points. A mask whose points fill more than
    10,000 of them holds far more than a car: its cells are 0.4 links wide, so that none has more
    than twenty neighbours and the work stays linear in the points.
    """
    if len(points_N3) < _CORE:
        return points_N3
    link = _FAR_LINK if np.median(points_N3[:, 2]) > _FAR else _LINK
    cell = _CELL
    cells, cell_of, counts = _cells(points_N3, cell)
    if len(cells) > _MOST_CELLS:
        cell = _LARGE_CELL * link
        cells, cell_of, counts = _cells(points_N3, cell)
    tree = cKDTree(cells * cell)
    pairs = tree.query_pairs(link, output_type="ndarray")
    neighbours = counts + np.bincount(pairs[:, 0], counts[pairs[:, 1]], len(cells))
    neighbours = neighbours + np.bincount(pairs[:, 1], counts[pairs[:, 0]], len(cells))
    core = neighbours >= _CORE
    if not core.any():
        return points_N3
    linked = pairs[core[pairs].all(axis=1)]
    graph = coo_matrix((np.ones(len(linked)), linked.T), shape=(len(cells), len(cells)))
    _, group = connected_components(graph, directed=False)
    for a, b in (pairs.T, pairs.T[::-1]):  # a border point joins the group of a core neighbour
        border = ~core[a] & core[b]
        group[a[border]] = group[b[border]]
    weight = np.bincount(group, np.where(core, counts, 0))
    return np.asarray(points_N3[(group == weight.argmax())[cell_of]])


def _cells(points_N3: Floats, side: float) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp]]:
    """Cells of the ground plane that hold points, each point's cell, and the points of each."""
    cells, cell_of, counts = np.unique(
        np.round(points_N3[:, ::2] / side), axis=0, return_inverse=True, return_counts=True
    )
    return cells, cell_of.ravel(), counts


def start_poses(
    mask_HW: Mask,
    points_N3: Floats,
    calibration: Calibration,
    ground: Ground,
    size_hwl: tuple[float, float, float],
    yaws: int = YAWS,
) -> Starts:
    """Headings over half a turn, each at the place where such a car would show its near side.

    The centre lies on the ray through the mask's middle column, half a car behind the near points;
    without points where the mask's height tells.

    Raises:
        InvalidRequest: no car can stand there, since the mask or its points are off the ground.
    """
    rows, columns = np.nonzero(mask_HW)
    middle, bottom = float(np.median(columns)), float(rows.max())
    _, ray = calibration.rays([[middle, bottom]])
    along = ray[0, ::2] / np.linalg.norm(ray[0, ::2])
    origin = calibration.camera_center[::2]
    if len(points_N3):
        if np.median(ground.height(points_N3)) > _HIGHEST:
            raise InvalidRequest(
                "above the ground: the points in this mask are "
                f"{np.median(ground.height(points_N3)):.1f} m above it, but a car stands on it; "
                "prompt another object",
                field="objects",
            )
        near = float(np.percentile((points_N3[:, ::2] - origin) @ along, _NEAR_SHARE))
    else:
        near = _range_from_mask(_rows_of(mask_HW), bottom, calibration, ground)
    _, width, length = size_hwl
    headings = np.arange(yaws) * math.pi / yaws
    # Heading is (cos, -sin) in (x, z); half of a box's extent along the viewing ray.
    beside = np.abs(np.cos(headings) * along[0] - np.sin(headings) * along[1])
    across = np.abs(np.sin(headings) * along[0] + np.cos(headings) * along[1])
    depth = near + beside * length / 2 + across * width / 2
    place = origin + depth[:, None] * along
    y = ground.a * place[:, 0] + ground.b * place[:, 1] + ground.c
    return Starts(np.column_stack([place[:, 0], y, place[:, 1]]), headings)


def _range_from_mask(height: int, bottom: float, calibration: Calibration, ground: Ground) -> float:
    """Distance of the near side when only the picture speaks."""
    _, ray = calibration.rays([[calibration.projection[0, 2], bottom]])
    slope = ray[0, 1] - ground.b  # how fast the lowest pixel's ray falls towards the ground
    if slope * _FARTHEST <= ground.c:
        raise InvalidRequest(
            f"at or above the horizon: this mask ends in row {bottom:.0f} and has no LiDAR points, "
            "but a car stands on the ground; prompt another object",
            field="objects",
        )
    return min(calibration.focal * _USUAL_HEIGHT / height, _FARTHEST)


def _rows_of(mask_HW: Mask) -> int:
    """Height of the mask in pixels."""
    return int(np.ptp(np.flatnonzero(mask_HW.any(axis=1)))) + 1 if mask_HW.any() else 1
