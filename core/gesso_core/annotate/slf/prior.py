"""The shape prior: a mean car and the directions in which cars differ.

    sdf(code) = mean + sum_k code_k deviation_k component_k

Principal components of procedural cars, each scaled to unit variance, so that a code is a draw from
a standard normal. ``python -m gesso_core.annotate.slf.prior`` builds the file that ships.
"""

# N cars   K components   B poses   X Y Z grid nodes

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gesso_core.annotate.slf.procedural_cars import Car, car_distance, draw_car
from gesso_core.annotate.slf.sdf import Grid
from gesso_core.errors import InvalidRequest, WeightsError
from gesso_core.hub.store import SHIPPED
from gesso_core.safe_files import read_tensors, write_tensors

# Which shipped prior serves which KITTI class.
PRIORS: Final = {"Car": "slf-cars"}
FILE: Final = "prior.safetensors"

VOXEL: Final = 0.1  # metres
SIZE: Final = (57, 26, 13)  # nodes along length, down, half of the width
ORIGIN: Final = (-2.8, -2.2, 0.0)
CLIP: Final = 0.6  # metres; further away the distance says nothing of the shape
COMPONENTS: Final = 16
TRAINED, TESTED, SEED = 400, 100, 11


@dataclass(frozen=True)
class ShapePrior:
    """Mean and scaled components of a class, on a grid that is mirrored across z."""

    kind: str
    mean_XYZ: Tensor
    components_KXYZ: Tensor  # each times its standard deviation
    origin_3: Tensor
    voxel: float
    sha256: str = ""

    @property
    def components(self) -> int:
        """Length of a shape code."""
        return len(self.components_KXYZ)

    def grid(self, code_BK: Tensor) -> Grid:
        """The shapes of these codes; differentiable in them."""
        flat = self.components_KXYZ[: code_BK.shape[1]].flatten(1)
        values = torch.addmm(self.mean_XYZ.reshape(1, -1), code_BK, flat)
        return Grid(values.view(-1, *self.mean_XYZ.shape), self.origin_3, self.voxel, mirrored=True)

    def encode(self, values_NXYZ: Tensor) -> Tensor:
        """Codes (N, K) of the nearest shapes in the span of the components."""
        flat = self.components_KXYZ.flatten(1).double()
        offsets = (values_NXYZ - self.mean_XYZ).flatten(1).double()
        solution: Tensor = torch.linalg.lstsq(flat.T, offsets.T).solution
        return solution.T.float()


@dataclass(frozen=True)
class Extent:
    """Where a shape begins and ends in its own frame, metres."""

    rear: float
    front: float
    top: float  # y grows downwards: the smaller one
    bottom: float
    half_width: float

    @property
    def size(self) -> tuple[float, float, float]:
        """(height, width, length)."""
        return self.bottom - self.top, 2 * self.half_width, self.front - self.rear


def extent_of(grid: Grid) -> Extent:
    """First and last zero crossing along each axis, interpolated between nodes; one shape."""
    values = grid.values.detach().reshape(grid.size)
    x, y, z = (values.amin(dim=axes).numpy() for axes in ((1, 2), (0, 2), (0, 1)))
    rear, front = _crossings(x, float(grid.origin_3[0]), grid.voxel)
    top, bottom = _crossings(y, float(grid.origin_3[1]), grid.voxel)
    _, half = _crossings(z, float(grid.origin_3[2]), grid.voxel)
    return Extent(rear, front, top, bottom, half)


def _crossings(distance: np.ndarray, origin: float, voxel: float) -> tuple[float, float]:
    inside = np.flatnonzero(distance < 0)
    if not inside.size:
        return 0.0, 0.0
    first, last = int(inside[0]), int(inside[-1])
    low, high = float(first), float(last)
    if first > 0:
        low -= float(distance[first] / (distance[first] - distance[first - 1]))
    if last + 1 < len(distance):
        high += float(distance[last] / (distance[last] - distance[last + 1]))
    return origin + voxel * low, origin + voxel * high


def grid_of(car: Car) -> Tensor:
    """A procedural car on the prior's grid, (X, Y, Z)."""
    x, y, z = (
        np.asarray(o + VOXEL * np.arange(n), np.float64) for o, n in zip(ORIGIN, SIZE, strict=True)
    )
    return torch.from_numpy(car_distance(car, x, y, z).clip(-CLIP, CLIP).astype(np.float32))


def draw_grids(count: int, seed: int) -> Tensor:
    """Cars of one seed on the grid, (N, X, Y, Z)."""
    rng = np.random.default_rng(seed)
    return torch.stack([grid_of(draw_car(rng)) for _ in range(count)])


def learn(values_NXYZ: Tensor, components: int = COMPONENTS) -> ShapePrior:
    """Principal components of the cars."""
    flat = values_NXYZ.flatten(1).double()
    mean = flat.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    scaled = directions * (deviations / (len(flat) - 1) ** 0.5)[:, None]
    # A singular vector's sign is arbitrary: make its largest entry positive, on every machine.
    largest = scaled.gather(1, scaled.abs().argmax(dim=1, keepdim=True))
    scaled = scaled * largest.sign()
    shape = values_NXYZ.shape[1:]
    return ShapePrior(
        kind="Car",
        mean_XYZ=mean.float().view(shape),
        components_KXYZ=scaled[:components].float().view(-1, *shape),
        origin_3=torch.tensor(ORIGIN),
        voxel=VOXEL,
    )


def held_out(prior: ShapePrior, values_NXYZ: Tensor) -> dict[str, float]:
    """How well codes describe cars that the prior has not seen: IoU and error near the surface."""
    found = prior.grid(prior.encode(values_NXYZ)).values
    inside, wanted = found < 0, values_NXYZ < 0
    overlap = (inside & wanted).flatten(1).sum(1) / (inside | wanted).flatten(1).sum(1)
    near = values_NXYZ.abs() < 0.1
    error = (found - values_NXYZ).abs()[near].mean()
    return {
        "iou_mean": round(float(overlap.mean()), 4),
        "iou_min": round(float(overlap.min()), 4),
        "surface_error_m": round(float(error), 4),
    }


def load_prior(kind: str = "Car", folder: Path | None = None) -> ShapePrior:
    """The prior of a KITTI class, by name, from the shipped weights or from ``folder``.

    Raises:
        InvalidRequest: no prior ships for this class.
        WeightsError: the file is missing, damaged, or of another shape.
    """
    if folder is None:
        if kind not in PRIORS:
            known = ", ".join(PRIORS)
            raise InvalidRequest(
                f"no shape prior for {kind!r}; available: {known}. Give a folder with one of your "
                f"own ({FILE})",
                field="kind",
            )
        folder = SHIPPED / PRIORS[kind]
    path = folder / FILE
    tensors = {name: value.float() for name, value in read_tensors(path).items()}
    if set(tensors) != {"mean", "components", "origin", "voxel"}:
        raise WeightsError(f"{path} is no shape prior: it holds {', '.join(sorted(tensors))}")
    if tensors["components"].shape[1:] != tensors["mean"].shape or tensors["mean"].ndim != 3:
        raise WeightsError(f"{path}: mean and components are of different sizes")
    return ShapePrior(
        kind=kind,
        mean_XYZ=tensors["mean"],
        components_KXYZ=tensors["components"],
        origin_3=tensors["origin"],
        voxel=round(float(tensors["voxel"]), 6),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def save_prior(prior: ShapePrior, folder: Path) -> None:
    """Write the prior in half precision."""
    tensors = {
        "mean": prior.mean_XYZ.half(),
        "components": prior.components_KXYZ.half(),
        "origin": prior.origin_3,
        "voxel": torch.tensor(prior.voxel),
    }
    # One entry: several are written in an order that changes from run to run.
    write_tensors(folder / FILE, tensors, {"kind": prior.kind})


def main(arguments: list[str] | None = None) -> None:
    """Draw cars, learn the prior, measure it on cars it has not seen, write it."""
    parser = argparse.ArgumentParser(description="build the shape prior of cars")
    parser.add_argument("--out", type=Path, default=SHIPPED / PRIORS["Car"])
    options = parser.parse_args(arguments)
    prior = learn(draw_grids(TRAINED, SEED))
    measured = held_out(prior, draw_grids(TESTED, SEED + 1))
    height, width, length = extent_of(prior.grid(torch.zeros(1, prior.components))).size
    save_prior(prior, options.out)
    card = {
        "model": PRIORS["Car"],
        "source": f"{TRAINED} procedural cars of this repository, seed {SEED}",
        "license": "Apache-2.0",
        "mean_size_hwl_m": [round(side, 3) for side in (height, width, length)],
        "held_out_cars": TESTED,
        **measured,
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
