"""What to look at of a frame: boxes in the picture, the same from above, all shapes as one mesh."""

# N objects   V vertices   F faces   H, W picture

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gesso_core.annotate.kitti.boxes import BOX_EDGES, corners
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject, boxes3d
from gesso_core.annotate.masks import Mask
from gesso_core.annotate.palette import Colour, colour_of
from gesso_core.annotate.slf.meshes import Mesh
from gesso_core.pipelines.pictures import Pixels

NEAREST: Final = 0.1  # metres of depth that an end of a drawn line needs
FRONT: Final = (0, 1, 4, 5)  # corners at the front of a box
# The view from above: metres ahead, metres to each side, pixels per metre.
AHEAD, ASIDE, SCALE = 60.0, 25.0, 10.0
GROUND, POINT, GRID = (16, 16, 20), (110, 110, 120), (40, 40, 48)


def picture_overlay(
    picture_HW3: Pixels,
    masks: Sequence[Mask],
    cars: Sequence[KittiObject | None],
    calibration: Calibration,
) -> Pixels:
    """Masks tinted and boxes drawn, one colour per object; an object without a box has None."""
    painted = picture_HW3.copy()
    for number, mask_HW in enumerate(masks):
        tint = np.array(colour_of(number), dtype=np.float64)
        painted[mask_HW] = (0.6 * painted[mask_HW] + 0.4 * tint).astype(np.uint8)
    image = Image.fromarray(painted)
    draw = ImageDraw.Draw(image)
    for number, car in enumerate(cars):
        if car is not None:
            _draw_box(draw, car, calibration, colour_of(number))
    return np.asarray(image, dtype=np.uint8)


def birds_eye(
    cars: Sequence[KittiObject | None], points_rect_N3: NDArray[np.float64] | None
) -> Pixels:
    """The road from above, the camera in the middle of the lower edge, a line every 10 metres."""
    size = (round(2 * ASIDE * SCALE), round(AHEAD * SCALE))
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)
    for metres in range(10, round(AHEAD), 10):
        y = size[1] - metres * SCALE
        draw.line([(0, y), (size[0], y)], fill=GRID)
    if points_rect_N3 is not None and len(points_rect_N3):
        _draw_points(image, points_rect_N3)
        draw = ImageDraw.Draw(image)
    for number, car in enumerate(cars):
        if car is None:
            continue
        ground_82 = _seen_from_above(corners(boxes3d([car]))[0])
        draw.polygon([tuple(p) for p in ground_82[:4]], outline=colour_of(number))
        middle = ground_82[:4].mean(axis=0)
        draw.line([tuple(middle), tuple(ground_82[:2].mean(axis=0))], fill=colour_of(number))
    return np.asarray(image, dtype=np.uint8)


def picture_corners(car: KittiObject, calibration: Calibration) -> list[tuple[float, float]]:
    """Pixels of the eight corners, bottom face first; empty where one is behind the camera."""
    points = corners(boxes3d([car]))[0]
    uv, depth = calibration.project(points)
    if (depth <= NEAREST).any():
        return []
    return [(float(u), float(v)) for u, v in uv]


def one_mesh(meshes: Sequence[Mesh]) -> Mesh:
    """All surfaces as one."""
    starts = np.cumsum([0, *(len(mesh.vertices_V3) for mesh in meshes)])
    if not meshes:
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint32))
    return Mesh(
        np.concatenate([mesh.vertices_V3 for mesh in meshes]),
        np.concatenate(
            [mesh.faces_F3 + np.uint32(start) for mesh, start in zip(meshes, starts, strict=False)]
        ),
    )


def _draw_box(
    draw: ImageDraw.ImageDraw, car: KittiObject, calibration: Calibration, colour: Colour
) -> None:
    points = corners(boxes3d([car]))[0]
    uv, depth = calibration.project(points)
    for a, b in BOX_EDGES:
        if depth[a] > NEAREST and depth[b] > NEAREST:
            width = 3 if a in FRONT and b in FRONT else 1
            draw.line([tuple(uv[a]), tuple(uv[b])], fill=colour, width=width)


def _draw_points(image: Image.Image, points_rect_N3: NDArray[np.float64]) -> None:
    x, y = _seen_from_above(points_rect_N3).round().astype(int).T
    inside = (x >= 0) & (x < image.width) & (y >= 0) & (y < image.height)
    painted = np.array(image)
    painted[y[inside], x[inside]] = POINT
    image.paste(Image.fromarray(painted))


def _seen_from_above(points_N3: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([(points_N3[:, 0] + ASIDE) * SCALE, (AHEAD - points_N3[:, 2]) * SCALE], axis=1)
