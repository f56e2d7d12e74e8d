"""Which corner reading starts at, and which way it goes, whatever order a polygon came in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import shapely

from gesso_core.annotate.char_sam.graphemes import graphemes
from gesso_core.annotate.char_sam.words import WordAnnotation, signed_area
from gesso_core.annotate.geometry import Point, Polygon

FLATTEST = 0.12  # share of a quadrilateral that the triangle at each of its corners must have
TALL = 1.5  # a word of several characters this much taller than wide is written downwards
STEEP = math.radians(60)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The edges along which a word is read: both run in the reading direction.

    Attributes:
        top: the edge above the characters as they are read, ``bottom`` the one below.
        downward: characters stand upright below one another; ``top`` is then the right edge.
        moved: the polygon began at another corner.
    """

    top: Polygon
    bottom: Polygon
    downward: bool = False
    moved: bool = False


def reading_of(word: WordAnnotation) -> Reading:
    """Put the polygon of a word in order.

    Counter-clockwise polygons keep their first point and are turned round. A quadrilateral whose
    first edge runs along its short side, or backwards, begins at the wrong corner: unless it is
    tall, when several characters are taken to be written downwards. Steep words whose first edge
    runs along the long side are believed: they were rotated.
    """
    count = sum(not cluster.isspace() for cluster in graphemes(word.text))
    if len(word.polygon) > 4:
        return _ribbon(word.polygon)
    corners = clockwise(squared(untangled(word.polygon)))
    start, downward = _start_corner(corners, count)
    a, b, c, d = corners[start:] + corners[:start]
    if downward:
        return Reading(top=(b, c), bottom=(a, d), downward=True, moved=start != 0)
    return Reading(top=(a, b), bottom=(d, c), moved=start != 0)


def untangled(polygon: Polygon) -> Polygon:
    """Four corners in turning order; corners given crosswise are sorted around their centre."""
    if len(polygon) != 4 or _is_convex(polygon):
        return polygon
    x, y = (sum(axis) / 4 for axis in zip(*polygon, strict=True))
    turning = sorted(polygon, key=lambda point: math.atan2(point[1] - y, point[0] - x))
    first = turning.index(polygon[0])
    return tuple(turning[first:] + turning[:first])


def squared(polygon: Polygon) -> Polygon:
    """Four corners through which a word can be laid flat, the first one kept.

    Where three of them lie on a line, nearly or quite, there is no perspective map: the smallest
    turned rectangle around them stands in.
    """
    triangles = [signed_area((polygon[i - 2], polygon[i - 1], polygon[i])) for i in range(4)]
    whole = abs(signed_area(polygon))
    if min(map(abs, triangles)) >= FLATTEST * whole and _is_convex(polygon):
        return polygon
    rectangle = shapely.MultiPoint(polygon).minimum_rotated_rectangle
    corners = tuple((float(x), float(y)) for x, y in rectangle.exterior.coords[:4])
    first = min(range(4), key=lambda i: math.dist(corners[i], polygon[0]))
    return corners[first:] + corners[:first]


def clockwise(polygon: Polygon) -> Polygon:
    """The polygon clockwise as seen, from the same first point."""
    return polygon if signed_area(polygon) >= 0 else (polygon[0], *polygon[:0:-1])


def _start_corner(corners: Polygon, count: int) -> tuple[int, bool]:
    """(Index of the corner reading starts at, whether it goes downwards) of a clockwise quad."""
    along, across = _length(corners[:2]), _length(corners[1:3])
    angle = _angle(corners[0], corners[1])
    if along >= across or count == 1:
        return (2 if _points_back(angle) else 0), False
    if across <= TALL * along:
        return 0, False
    # The first edge is the short one: either a tall word, or a start one corner off.
    if abs(abs(angle) - math.pi / 2) < math.pi / 2 - STEEP:
        return (1 if not _points_back(_angle(corners[1], corners[2])) else 3), False
    return (2 if _points_back(angle) else 0), True


def _ribbon(polygon: Polygon) -> Reading:
    """Edges of a bent word: cut where opposite points of the two edges are nearest."""
    points = clockwise(polygon)
    half = len(points) // 2

    def edges(start: int) -> tuple[Polygon, Polygon]:
        turned = points[start:] + points[:start]
        return turned[:half], turned[half:][::-1]

    def rungs(start: int) -> float:
        return sum(math.dist(above, below) for above, below in zip(*edges(start), strict=False))

    best = min(range(len(points)), key=rungs)
    start = 0 if rungs(0) <= 1.25 * rungs(best) else best
    top, bottom = edges(start)
    backwards = _points_back(_angle(top[0], top[-1]))
    if backwards:
        top, bottom = bottom[::-1], top[::-1]
    return Reading(top=top, bottom=bottom, moved=start != 0 or backwards)


def _points_back(angle: float) -> bool:
    return abs(angle) > math.pi - STEEP


def _is_convex(polygon: Polygon) -> bool:
    turns = [
        signed_area((polygon[i - 2], polygon[i - 1], polygon[i])) > 0 for i in range(len(polygon))
    ]
    return all(turns) or not any(turns)


def _length(points: Sequence[Point]) -> float:
    return math.dist(points[0], points[1])


def _angle(a: Point, b: Point) -> float:
    return math.atan2(b[1] - a[1], b[0] - a[0])
