"""Lay a word out flat: its polygon becomes an upright rectangle, characters from left to right.

A quadrilateral is laid out by its perspective map; a bent word is unrolled between its top and its
bottom edge, each measured by arc length. The rectangle knows the picture position of each of its
pixels, so that boxes and masks find their way back.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree

from gesso_core.annotate.char_sam.reading import Reading
from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.masks import Mask

# H, W the picture or a crop of it   h, w the rectangle   u, v its coordinates


MIN_HEIGHT, MAX_HEIGHT = 48, 192  # finer is of no use to cuts and glyphs
MAX_WIDTH = 4096
MARGIN = 0.15  # of the height, kept around the polygon: glyphs may reach over it


@dataclass(frozen=True, eq=False)
class Rectangle:
    """A word laid out flat.

    Attributes:
        grid_hw2: picture coordinates (x, y) of the centre of each pixel.
        margin: pixels on each side that lie outside the polygon.
        scale: pixels of the rectangle per pixel of the picture.
        downward: the characters lie on their left side, because the word is written downwards.
    """

    grid_hw2: Floats
    margin: int
    scale: float
    downward: bool = False
    homography_33: Floats | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w), margins included."""
        return self.grid_hw2.shape[0], self.grid_hw2.shape[1]

    def sample(self, values_HW: Mask | Floats) -> Floats:
        """Values of the picture, laid out flat, (h, w); 0 outside the picture."""
        x, y = np.moveaxis(self.grid_hw2, -1, 0)
        laid: Floats = map_coordinates(
            np.asarray(values_HW, dtype=np.float64), [y - 0.5, x - 0.5], order=1, cval=0.0
        )
        return laid

    def sample_mask(self, mask_HW: Mask) -> Mask:
        """A mask of the picture, laid out flat."""
        return self.sample(mask_HW) >= 0.5

    def to_picture(self, u: Floats, v: Floats) -> Floats:
        """Picture coordinates (n, 2) of points of the rectangle."""
        rows, columns = np.asarray(v) - 0.5, np.asarray(u) - 0.5
        if self.homography_33 is not None:
            return _project(self.homography_33, u, v)
        return np.stack(
            [
                map_coordinates(self.grid_hw2[..., axis], [rows, columns], order=1, mode="nearest")
                for axis in range(2)
            ],
            axis=-1,
        )

    def from_picture(self, x: Floats, y: Floats) -> Floats:
        """Coordinates (n, 2) in the rectangle of points of the picture.

        Exact for quadrilaterals; of a bent word the nearest pixel's centre, or infinity far off.
        """
        if self.homography_33 is not None:
            inverse_33 = np.asarray(np.linalg.inv(self.homography_33), np.float64)
            return _project(inverse_33, x, y)
        bound = 2 / self.scale + 1
        distance, index = self._tree.query(np.stack([x, y], -1), distance_upper_bound=bound)
        width = self.size[1]
        found = np.isfinite(distance)
        v, u = np.divmod(np.where(found, index, 0), width)
        return np.where(found[..., None], np.stack([u + 0.5, v + 0.5], -1), np.inf)

    def paint(self, mask_hw: Mask, size: tuple[int, int]) -> Mask:
        """A mask of the rectangle, back in the picture, (H, W)."""
        painted_HW = np.zeros(size, dtype=bool)
        rows, columns = np.nonzero(mask_hw)
        if not rows.size:
            return painted_HW
        near = self.to_picture(*(np.asarray(p + 0.5, np.float64) for p in (columns, rows)))
        height, width = size
        x0, y0 = np.clip(np.floor(near.min(0)).astype(int) - 1, 0, None)
        x1, y1 = np.minimum(np.ceil(near.max(0)).astype(int) + 1, (width, height))
        if x1 <= x0 or y1 <= y0:
            return painted_HW
        y, x = np.mgrid[y0:y1, x0:x1]
        u, v = np.moveaxis(self.from_picture(x.ravel() + 0.5, y.ravel() + 0.5), -1, 0)
        inside = (u >= 0) & (v >= 0) & (u < mask_hw.shape[1]) & (v < mask_hw.shape[0])
        values = np.zeros(u.shape, dtype=bool)
        values[inside] = mask_hw[v[inside].astype(int), u[inside].astype(int)]
        painted_HW[y0:y1, x0:x1] = values.reshape(y.shape)
        return painted_HW

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.grid_hw2.reshape(-1, 2))


def rectify(reading: Reading, *, origin: tuple[float, float] = (0.0, 0.0)) -> Rectangle:
    """The rectangle of a word; ``origin`` is the corner of the crop it is looked at in."""
    top, bottom = (np.asarray(edge, float) - origin for edge in (reading.top, reading.bottom))
    (height, width), scale = flat_size(reading)
    margin = math.ceil(MARGIN * height)
    u, v = np.meshgrid(
        np.arange(width + 2 * margin) + 0.5, np.arange(height + 2 * margin) + 0.5, indexing="xy"
    )
    if len(top) == len(bottom) == 2:
        left, up, right, down = margin, margin, margin + width, margin + height
        corners = np.array([(left, up), (right, up), (right, down), (left, down)], float)
        matrix = homography(corners, np.array([top[0], top[1], bottom[1], bottom[0]]))
        grid = _project(matrix, u.ravel(), v.ravel()).reshape(*u.shape, 2)
        return Rectangle(grid, margin, scale, reading.downward, matrix)
    along, down = (u[0] - margin) / width, (v[:, 0] - margin) / height
    above, below = _along(top, along), _along(bottom, along)
    grid = above[None] + down[:, None, None] * (below - above)[None]
    return Rectangle(grid, margin, scale, reading.downward)


def flat_size(reading: Reading) -> tuple[tuple[int, int], float]:
    """(h, w) of a word laid out flat, without margins, and pixels of it per picture pixel."""
    top, bottom = np.asarray(reading.top, float), np.asarray(reading.bottom, float)
    length = (_arc(top)[-1] + _arc(bottom)[-1]) / 2
    depth = (math.dist(top[0], bottom[0]) + math.dist(top[-1], bottom[-1])) / 2
    scale = min(max(1.0, MIN_HEIGHT / max(depth, 1e-6)), MAX_HEIGHT / max(depth, 1e-6))
    scale = min(scale, MAX_WIDTH / max(length, 1e-6))
    return (max(round(depth * scale), 4), max(round(length * scale), 4)), scale


def homography(source_42: Floats, target_42: Floats) -> Floats:
    """The perspective map that takes four points to four others."""
    rows = []
    for (u, v), (x, y) in zip(source_42, target_42, strict=True):
        rows.append([u, v, 1, 0, 0, 0, -u * x, -v * x])
        rows.append([0, 0, 0, u, v, 1, -u * y, -v * y])
    solved = np.linalg.solve(np.array(rows), target_42.reshape(-1))
    return np.append(solved, 1.0).reshape(3, 3)


def _project(matrix_33: Floats, x: Floats, y: Floats) -> Floats:
    mapped = np.stack([x, y, np.ones_like(np.asarray(x, float))], -1) @ matrix_33.T
    return mapped[..., :2] / mapped[..., 2:]


def _arc(points: Floats) -> Floats:
    """Length along a line of points, at each of them."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])


def _along(points: Floats, share: Floats) -> Floats:
    """Points at shares of a line's length; beyond its ends it goes straight on."""
    arc = _arc(points)
    position = share * arc[-1]
    inside = np.stack([np.interp(position, arc, points[:, axis]) for axis in range(2)], -1)
    first = (points[1] - points[0]) / max(arc[1], 1e-9)
    last = (points[-1] - points[-2]) / max(arc[-1] - arc[-2], 1e-9)
    before, after = np.minimum(position, 0.0), np.maximum(position - arc[-1], 0.0)
    points_N2: Floats = inside + before[:, None] * first + after[:, None] * last
    return points_N2
