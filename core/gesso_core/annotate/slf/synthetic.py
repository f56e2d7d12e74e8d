"""A KITTI-like data set made here: cars that the prior has not seen, simulated LiDAR, occluders.

A street with cars on a slightly tilted ground, posts and boxes in front of some, a spinning LiDAR
of 64 beams and a camera, both by casting rays. Masks are the visible pixels, roughened as a
segmenter's are; those of a hidden car may take in pixels of the car before it.
"""

# P pixels or rays   H W picture

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.kitti.boxes import bev_iou, observation_angle, projected_box
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.masks import Mask, box_of_mask
from gesso_core.annotate.slf.ground import Ground
from gesso_core.annotate.slf.procedural_cars import Car, draw_car, in_window, true_size
from gesso_core.annotate.slf.ray_casting import Block, Solid, cast, solid_of
from gesso_core.annotate.slf.scene import Scene, SegmentedObject

HEIGHT, WIDTH = 375, 1242
SEED: Final = 2024  # no seed of the prior
_BEAMS = np.radians(np.linspace(-24.8, 2.0, 64))
_AZIMUTHS = np.radians(np.arange(-45, 45, 0.2))
_RANGE_NOISE, _LOST, _LOST_IN_GLASS = 0.02, 0.08, 0.6  # metres, shares of the returns
_CARS = (4, 8)  # per frame, the upper one exclusive
_SEEN_PIXELS, _SEEN_SHARE = 150, 0.2  # what must be visible of a car to be prompted
_LEAK: Final = 0.4  # how often a mask takes in the car before it
_PREDICTED_IOU: Final = 0.95
_FARTHEST: Final = 80.0


@dataclass(frozen=True)
class SyntheticFrame:
    """A scene and the truth about it; labels and prompts are in the same order."""

    name: str
    scene: Scene
    labels: tuple[KittiObject, ...]


@dataclass(frozen=True)
class _Placed:
    """A car on the road; the box is (h, w, l, x, y, z, ry)."""

    car: Car
    solid: Solid
    box: tuple[float, ...]


def synthetic_frames(count: int, seed: int = SEED) -> Iterator[SyntheticFrame]:
    """So many frames, each from its own generator: frame k does not depend on the count."""
    for k in range(count):
        yield _frame(f"{k:06d}", np.random.default_rng([seed, k]))


def kitti_like_calibration() -> Calibration:
    """A camera of 720 pixels focal length, the LiDAR 27 cm behind and 8 cm above it."""
    camera = np.array([[720.0, 0, 610], [0, 720, 175], [0, 0, 1]])
    projection = np.column_stack([camera, [44.0, 0.2, 0.003]])
    velo_to_cam = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])
    return Calibration(projection, np.eye(3), velo_to_cam)


def _frame(name: str, rng: np.random.Generator) -> SyntheticFrame:
    calibration = kitti_like_calibration()
    a, b, c = rng.normal((0, 0, 1.65), (0.006, 0.006, 0.03)).tolist()
    ground = Ground(a, b, c, found=True)
    cars = _place_cars(rng, ground, calibration)
    blocks = _place_blocks(rng, ground, cars)
    owner_HW = _draw(cars, blocks, calibration)
    points = _scan(cars, blocks, ground, calibration, rng)
    whole = [_silhouette(car, calibration) for car in cars]
    visible = [owner_HW == i for i in range(len(cars))]
    kept = [
        i
        for i, (seen, all_of_it) in enumerate(zip(visible, whole, strict=True))
        if seen.sum() >= max(_SEEN_PIXELS, _SEEN_SHARE * all_of_it.sum())
    ]
    objects = [_prompt(i, visible, whole, owner_HW, rng) for i in kept]
    labels = [_label(cars[i], visible[i], whole[i], calibration) for i in kept]
    return SyntheticFrame(name, Scene(calibration, objects, points), tuple(labels))


def _place_cars(
    rng: np.random.Generator, ground: Ground, calibration: Calibration
) -> list[_Placed]:
    """Cars in lanes and at random, not touching each other, in view of the camera."""
    placed: list[_Placed] = []
    wanted = int(rng.integers(*_CARS))
    for _ in range(60):
        if len(placed) == wanted:
            break
        car = draw_car(rng)
        z = float(rng.uniform(5, 42))
        lane = rng.choice([-6.5, -3.2, 0.3, 3.4, 6.5]) + rng.normal(0, 0.4)
        x = float(lane if rng.random() < 0.8 else rng.uniform(-0.6, 0.6) * z)
        along = rng.choice([-1, 1]) * math.pi / 2 + rng.normal(0, 0.08)
        angle = float(along if rng.random() < 0.75 else rng.uniform(-math.pi, math.pi))
        y = ground.a * x + ground.b * z + ground.c
        box = (*true_size(car), x, y, z, angle)
        if _fits(box, placed, calibration):
            placed.append(_Placed(car, solid_of(car, box), box))
    return placed


def _fits(box: tuple[float, ...], placed: list[_Placed], calibration: Calibration) -> bool:
    left, _, right, _ = projected_box([box], calibration)[0]
    inside = min(right, WIDTH) - max(left, 0)
    if inside < 0.45 * (right - left) or box[5] < 0.7 * box[2] + 1:
        return False
    roomy = [(h, w + 0.5, length + 0.8, *rest) for h, w, length, *rest in (p.box for p in placed)]
    return not placed or float(bev_iou([box], roomy).max()) == 0


def _place_blocks(rng: np.random.Generator, ground: Ground, cars: list[_Placed]) -> list[Block]:
    """Posts and boxes between the camera and some of the cars."""
    blocks = []
    for car in cars:
        if rng.random() > 0.35:
            continue
        x, z = car.box[3], car.box[5]
        nearer = float(rng.uniform(0.45, 0.75))
        post = rng.random() < 0.5
        width, height = (0.15, 3.0) if post else rng.uniform((0.4, 0.6), (0.9, 1.1))
        at_x = x * nearer + float(rng.uniform(-1, 1)) * nearer
        at_z = z * nearer
        y = ground.a * at_x + ground.b * at_z + ground.c
        box = (height, width, width, at_x, y, at_z, 0.0)
        if float(bev_iou([box], [c.box for c in cars]).max()) == 0:
            blocks.append(Block(box))
    return blocks


def _rays(calibration: Calibration, box: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Pixels of a picture box, (P, 2) as (u, v), and their unit rays."""
    low = np.clip(np.floor(box[:2]), 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
    high = np.clip(np.ceil(box[2:]), 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
    u, v = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
    pixels = np.column_stack([u.ravel(), v.ravel()])
    _, rays = calibration.rays(pixels)
    return pixels, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _picture_box(box: tuple[float, ...], calibration: Calibration) -> Floats:
    return np.asarray(projected_box([box], calibration)[0])


def _draw(cars: list[_Placed], blocks: list[Block], calibration: Calibration) -> NDArray[np.int_]:
    """Which car each pixel shows: its index, -1 for none, -2 for a block."""
    owner = np.full((HEIGHT, WIDTH), -1)
    nearest = np.full((HEIGHT, WIDTH), np.inf)
    things: list[tuple[int, Solid | Block, tuple[float, ...]]]
    things = [(i, p.solid, p.box) for i, p in enumerate(cars)]
    things += [(-2, block, block.box) for block in blocks]
    for i, thing, box in things:
        pixels, rays = _rays(calibration, _picture_box(box, calibration))
        reach = cast(thing, calibration.camera_center, rays)
        u, v = pixels[:, 0], pixels[:, 1]
        nearer = reach < nearest[v, u]
        owner[v[nearer], u[nearer]] = i
        nearest[v[nearer], u[nearer]] = reach[nearer]
    return owner


def _silhouette(car: _Placed, calibration: Calibration) -> Mask:
    """All pixels of a car inside the picture, whatever is in front of it."""
    pixels, rays = _rays(calibration, _picture_box(car.box, calibration))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    hit = np.isfinite(cast(car.solid, calibration.camera_center, rays))
    mask[pixels[hit, 1], pixels[hit, 0]] = True
    return mask


def _scan(
    cars: list[_Placed],
    blocks: list[Block],
    ground: Ground,
    calibration: Calibration,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """LiDAR returns (N, 4) in the velodyne frame; glass and chance swallow some."""
    azimuth, beam = (a.ravel() for a in np.meshgrid(_AZIMUTHS, _BEAMS))
    velo = np.column_stack(
        [np.cos(beam) * np.cos(azimuth), np.cos(beam) * np.sin(azimuth), np.sin(beam)]
    )
    origin = calibration.rect_from_velo(np.zeros((1, 3)))[0]
    rays = calibration.rect_from_velo(velo) - origin
    falling = rays[:, 1] - ground.a * rays[:, 0] - ground.b * rays[:, 2]
    above = ground.height(origin[None])[0]
    reach = np.where(falling > 1e-3, above / np.maximum(falling, 1e-3), np.inf)
    glass = np.zeros(len(rays), bool)
    things: list[tuple[Solid | Block, Car | None]] = [(p.solid, p.car) for p in cars]
    for thing, car in (*things, *((block, None) for block in blocks)):
        hit = cast(thing, origin, rays)
        nearer = hit < reach
        reach[nearer] = hit[nearer]
        glass[nearer] = False
        if car is not None and isinstance(thing, Solid):
            at = thing.inside_frame(origin + hit[nearer, None] * rays[nearer])
            glass[nearer] = in_window(car, at)
    lost = rng.random(len(rays)) < np.where(glass, _LOST_IN_GLASS, _LOST)
    kept = (reach < _FARTHEST) & ~lost
    noisy = reach[kept] + rng.normal(0, _RANGE_NOISE, int(kept.sum()))
    points = calibration.velo_from_rect(origin + noisy[:, None] * rays[kept])
    return np.column_stack([points, np.full(len(points), 0.3)]).astype(np.float32)


def _prompt(
    i: int,
    visible: list[Mask],
    whole: list[Mask],
    owner_HW: NDArray[np.int_],
    rng: np.random.Generator,
) -> SegmentedObject:
    """A box drawn around the car, its far side guessed, and the mask a segmenter would give."""
    jitter = rng.normal(0, 1.0, 4)
    box = np.clip(np.array(box_of_mask(whole[i])) + jitter, 0, [WIDTH - 1, HEIGHT - 1] * 2)
    mask = visible[i].copy()
    before = np.unique(owner_HW[whole[i] & ~visible[i]])
    if rng.random() < _LEAK:
        for other in before[before >= 0]:
            mask |= visible[other]
    noise = gaussian_filter(rng.normal(0, 1, mask.shape), 3.0) * 6
    soft = gaussian_filter(mask.astype(np.float32), 1.2) + 0.12 * noise
    inside = np.zeros_like(mask)
    x0, y0, x1, y1 = (round(side) for side in box)
    inside[y0 : y1 + 1, x0 : x1 + 1] = True
    rough = (soft > 0.5) & inside
    left, top, right, bottom = box.tolist()
    return SegmentedObject(rough, (left, top, right, bottom), _PREDICTED_IOU)


def _label(placed: _Placed, visible: Mask, whole: Mask, calibration: Calibration) -> KittiObject:
    box, (h, w, length, x, y, z, angle) = placed.box, placed.box
    left, top, right, bottom = box_of_mask(whole)
    amodal = projected_box([box], calibration)[0]
    clipped = np.clip(amodal, 0, [WIDTH - 1, HEIGHT - 1] * 2)
    hidden = 1 - visible.sum() / max(int(whole.sum()), 1)
    return KittiObject(
        kind="Car",
        truncated=float(1 - np.prod(clipped[2:] - clipped[:2]) / np.prod(amodal[2:] - amodal[:2])),
        occluded=int(hidden > 0.1) + int(hidden > 0.5),
        alpha=float(observation_angle([box])[0]),
        box2d=(left, top, right - 1.0, bottom - 1.0),
        size=(h, w, length),
        location=(x, y, z),
        rotation_y=angle,
    )
