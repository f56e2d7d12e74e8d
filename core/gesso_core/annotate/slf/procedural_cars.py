"""Cars drawn from a handful of numbers, as exact-enough signed distances.

A side profile, rounded and extruded across a width that narrows towards the roof and towards both
ends, on four wheels. They train the shape prior and, with other seeds, test it.
"""

# P points   V corners of the profile

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Floats

Range = tuple[float, float]


@dataclass(frozen=True)
class BodyStyle:
    """Ranges of one kind of car. Positions along the car are shares of its length from the rear."""

    share: float  # of all cars
    length: Range  # metres
    width: Range
    height: Range
    rear_glass: Range  # where the rear window meets the body
    roof_rear: Range  # how far in front of that the roof begins
    roof_front: Range
    windscreen: Range  # how far in front of the roof the windscreen meets the bonnet
    bonnet: Range = (0.60, 0.68)  # height of the bonnet, share of the car's height


BODY_STYLES: Mapping[str, BodyStyle] = MappingProxyType(
    {
        "micro": BodyStyle(
            0.06, (2.5, 3.2), (1.45, 1.6), (1.45, 1.60), (0.01, 0.03), (0.06, 0.12),
            (0.55, 0.65), (0.18, 0.26),
        ),
        "hatchback": BodyStyle(
            0.36, (3.4, 4.1), (1.52, 1.72), (1.45, 1.60), (0.01, 0.05), (0.07, 0.14),
            (0.50, 0.60), (0.14, 0.20),
        ),
        "sedan": BodyStyle(
            0.22, (3.85, 4.6), (1.57, 1.78), (1.40, 1.54), (0.14, 0.20), (0.10, 0.15),
            (0.52, 0.58), (0.14, 0.19),
        ),
        "estate": BodyStyle(
            0.14, (3.9, 4.6), (1.57, 1.77), (1.44, 1.58), (0.01, 0.03), (0.04, 0.10),
            (0.52, 0.60), (0.14, 0.18),
        ),
        "suv": BodyStyle(
            0.09, (3.8, 4.5), (1.65, 1.84), (1.62, 1.84), (0.01, 0.04), (0.05, 0.10),
            (0.54, 0.62), (0.10, 0.16), (0.60, 0.66),
        ),
        "minivan": BodyStyle(
            0.11, (3.7, 4.5), (1.58, 1.78), (1.62, 1.88), (0.00, 0.03), (0.03, 0.07),
            (0.58, 0.68), (0.18, 0.26), (0.54, 0.62),
        ),
        "pickup": BodyStyle(
            0.02, (4.6, 5.2), (1.70, 1.88), (1.62, 1.80), (0.38, 0.44), (0.01, 0.03),
            (0.62, 0.68), (0.10, 0.15),
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Car:
    """One car; lengths in metres, profile positions from the rear bumper."""

    style: str
    length: float
    width: float
    height: float
    profile_V2: tuple[tuple[float, float], ...]  # (along, height above ground)
    belt: float  # height where the windows begin
    tumblehome: float  # how much narrower the roof is, share of the width
    end_taper: float  # how much narrower both ends are, share of the width
    rounding: float
    wheel_radius: float
    axles: tuple[float, float]  # metres from the centre, rear and front


def draw_car(rng: np.random.Generator, style: str | None = None) -> Car:
    """A random car; the order of draws is: style, sizes, profile, belt, taper, wheels."""
    names = list(BODY_STYLES)
    drawn = str(rng.choice(names, p=[BODY_STYLES[name].share for name in names]))
    style = style or drawn
    body = BODY_STYLES[style]
    length, width, height = (rng.uniform(*r) for r in (body.length, body.width, body.height))
    rear_glass, roof_rear, roof_front, windscreen = (
        rng.uniform(*r) for r in (body.rear_glass, body.roof_rear, body.roof_front, body.windscreen)
    )
    belt = height * rng.uniform(0.60, 0.68)
    bonnet = min(height * rng.uniform(*body.bonnet), belt)
    clearance, tail = rng.uniform(0.16, 0.24), belt * rng.uniform(0.94, 1.02)
    tip = rng.uniform(0.78, 0.92)
    points = (
        (0.02, clearance), (0.0, 0.55 * belt), (0.01, tail), (rear_glass + 0.005, belt),
        (rear_glass + roof_rear, height * rng.uniform(0.95, 0.99)),
        (rear_glass + roof_rear + 0.12, height), (roof_front, height * rng.uniform(0.97, 1.0)),
        (min(roof_front + windscreen, 0.93), bonnet), (0.965, bonnet * tip),
        (1.0, 0.5 * bonnet), (0.98, clearance),
    )  # fmt: skip
    return Car(
        style=style,
        length=length,
        width=width,
        height=height,
        profile_V2=tuple((share * length, up) for share, up in points),
        belt=belt,
        tumblehome=rng.uniform(0.12, 0.26),
        end_taper=rng.uniform(0.06, 0.18),
        rounding=rng.uniform(0.05, 0.10),
        wheel_radius=rng.uniform(0.28, 0.34),
        axles=(-length * rng.uniform(0.28, 0.33), length * rng.uniform(0.29, 0.34)),
    )


def car_distance(car: Car, x: Floats, y: Floats, z: Floats) -> Floats:
    """Signed distance (X, Y, Z) in metres at the nodes of a grid: x front, y down, z across."""
    along, up, across = x[:, None, None], -y[None, :, None], np.abs(z[None, None, :])
    profile = np.array(car.profile_V2) - (car.length / 2, 0)
    flat = np.stack(np.meshgrid(x, -y, indexing="ij"), axis=-1)
    # The profile is the same across the car, and by far the dearest part.
    side = polygon_distance(profile, flat.reshape(-1, 2)).reshape(len(x), len(y), 1)
    over_belt = np.clip((up - car.belt) / (car.height - car.belt), 0, 1)
    to_end = np.clip(np.abs(along) / (car.length / 2), 0, 1)
    half = car.width / 2 * (1 - car.tumblehome * over_belt) * (1 - car.end_taper * to_end**4)
    body = _extrude(side, across - half, car.rounding)
    return np.asarray(np.minimum(body, _wheels(car, along, up, across)))


def _extrude(side: Floats, across: Floats, rounding: float) -> Floats:
    """Where two distances of perpendicular planes meet, with the edge between them rounded."""
    both = np.stack(np.broadcast_arrays(side, across)) + rounding
    outside = np.hypot(*np.maximum(both, 0))
    return np.asarray(outside + np.minimum(both.max(axis=0), 0) - rounding)


def _wheels(car: Car, along: Floats, up: Floats, across: Floats) -> Floats:
    tread, inset = 0.2, 0.03
    middle = car.width / 2 - inset - tread / 2
    sides = np.abs(across - middle) - tread / 2
    discs = [np.hypot(along - x, up - car.wheel_radius) - car.wheel_radius for x in car.axles]
    return _extrude(np.minimum(*discs), sides, 0.02)


def polygon_distance(corners_V2: Floats, points_P2: Floats) -> Floats:
    """Signed distance (P,) to a simple polygon: exact, negative inside."""
    start, end = corners_V2, np.roll(corners_V2, -1, axis=0)
    edge = end - start
    rel = points_P2[:, None] - start[None]
    t = np.clip((rel * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.linalg.norm(rel - t[..., None] * edge, axis=-1).min(axis=1)
    x, y = points_P2[:, 0, None], points_P2[:, 1, None]
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    slope = np.divide(edge[:, 0], edge[:, 1], out=np.zeros(len(edge)), where=edge[:, 1] != 0)
    left = x < start[:, 0] + (y - start[:, 1]) * slope
    inside = (crosses & left).sum(axis=1) % 2 == 1
    return np.asarray(np.where(inside, -distance, distance), np.float64)


def true_size(car: Car) -> tuple[float, float, float]:
    """(height, width, length) of the tightest box around the car, in metres."""
    return car.height, car.width, car.length


def in_window(car: Car, points_P3: Floats) -> NDArray[np.bool_]:
    """Points of the car's surface that are glass: between belt and roof, not on a pillar."""
    up = -points_P3[:, 1]
    pillar = np.abs(points_P3[:, 0] % 1.1) < 0.08
    return np.asarray((up > car.belt + 0.05) & (up < car.height - 0.08) & ~pillar)
