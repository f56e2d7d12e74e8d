"""A shape prior from one's own meshes of cars.

``python -m gesso_core.annotate.slf.mesh_prior FOLDER --out MINE`` turns the OBJ and PLY files of a
folder into signed distances on the prior's grid, and learns mean and components from them. Meshes
must be watertight and in metres.

Distance is that to the nearest of many points on the surface. Inside is where a ray across the car
winds around: parts that overlap, like wheels in a body, count as one solid.
"""

# V vertices   F faces   H hits of rays on faces   X Y Z grid nodes

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from gesso_core.annotate.geometry import Floats
from gesso_core.annotate.slf.mesh_files import SUFFIXES, read_mesh
from gesso_core.annotate.slf.meshes import Mesh
from gesso_core.annotate.slf.prior import (
    CLIP,
    COMPONENTS,
    ORIGIN,
    SIZE,
    VOXEL,
    draw_grids,
    extent_of,
    held_out,
    learn,
    save_prior,
)
from gesso_core.errors import GessoError, InvalidRequest

DIRECTIONS: Final = {
    f"{sign}{axis}": tuple((-1.0 if sign else 1.0) * (i == j) for j in range(3))
    for sign in ("", "-")
    for i, axis in enumerate("xyz")
}
FEWEST: Final = 3  # shapes that mean and components can be learned from
_SPACING: Final = 0.02  # metres between points on the surface
_SHORTEST: Final = 1.5  # metres; a shorter car is most likely not in metres
_SEED: Final = 7


def stand_up(mesh: Mesh, *, front: str, up: str) -> Mesh:
    """The mesh in the prior's frame: x forward, y down with 0 at the lowest point, z across; its
    middle at x = z = 0.

    Args:
        front, up: where the car's front and roof are in the mesh's own axes: x, -x, y, ...

    Raises:
        InvalidRequest: directions that are none or lie along one axis, or a car that the grid
            cannot hold.
    """
    for name in (front, up):
        if name not in DIRECTIONS:
            raise InvalidRequest(f"direction {name!r}; use {', '.join(DIRECTIONS)}", field="front")
    ahead, down = np.array(DIRECTIONS[front]), -np.array(DIRECTIONS[up])
    if front[-1] == up[-1]:
        raise InvalidRequest(f"front {front} and up {up} lie along one axis", field="front")
    axes = np.stack([ahead, down, np.cross(ahead, down)])
    points = mesh.vertices_V3.astype(np.float64) @ axes.T
    low, high = points.min(axis=0), points.max(axis=0)
    points -= ((low[0] + high[0]) / 2, high[1], (low[2] + high[2]) / 2)
    length, height, width = high - low
    room = (2 * -ORIGIN[0], -ORIGIN[1], 2 * VOXEL * (SIZE[2] - 1))
    if length < _SHORTEST or any(
        a >= b for a, b in zip((length, height, width), room, strict=True)
    ):
        raise InvalidRequest(
            f"this car is {length:.2f} m long, {width:.2f} m wide and {height:.2f} m high; cars of "
            f"{_SHORTEST} m to {room[0]:.1f} x {room[2]:.1f} x {room[1]:.1f} m fit. Is it in "
            f"metres, and are front ({front}) and up ({up}) right?",
            field="meshes",
        )
    return Mesh(points.astype(np.float32), mesh.faces_F3)


def grid_of_mesh(mesh: Mesh) -> Tensor:
    """Signed distances (X, Y, Z) of a mesh that stands in the prior's frame, its two halves
    averaged.

    Raises:
        InvalidRequest: a mesh that is not watertight.
    """
    _check_closed(mesh)
    x, y, z = (
        o + VOXEL * np.arange(n, dtype=np.float64) for o, n in zip(ORIGIN, SIZE, strict=True)
    )
    across = np.concatenate([-z[:0:-1], z])
    nodes = np.stack(np.meshgrid(x, y, across, indexing="ij"), axis=-1)
    distance, _ = cKDTree(_surface_points(mesh)).query(nodes, distance_upper_bound=CLIP)
    signed = np.where(_inside(mesh, x, y, across), -1, 1) * np.minimum(distance, CLIP)
    half = len(z) - 1
    both = (signed[..., half:] + signed[..., half::-1]) / 2
    return torch.from_numpy(both.astype(np.float32))


def _check_closed(mesh: Mesh) -> None:
    """Every edge must be walked as often one way as the other."""
    _, same = np.unique(mesh.vertices_V3, axis=0, return_inverse=True)  # seams share their place
    faces = same.ravel()[mesh.faces_F3]
    edges = np.concatenate([faces[:, [i, (i + 1) % 3]] for i in range(3)]).astype(np.int64)
    edges = edges[edges[:, 0] != edges[:, 1]]
    count = len(mesh.vertices_V3)
    walked, times = np.unique(edges[:, 0] * count + edges[:, 1], return_counts=True)
    back, times_back = np.unique(edges[:, 1] * count + edges[:, 0], return_counts=True)
    if not np.array_equal(walked, back) or not np.array_equal(times, times_back):
        open_edges = len(np.setxor1d(walked, back)) // 2
        raise InvalidRequest(
            f"the mesh is not watertight: {open_edges} open edges, or faces that turn both ways; "
            "close its holes first",
            field="meshes",
        )


def _surface_points(mesh: Mesh) -> Floats:
    """Points on the faces, about two centimetres apart, always the same."""
    a, b, c = (mesh.vertices_V3[mesh.faces_F3[:, i]].astype(np.float64) for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    face = np.repeat(np.arange(len(a)), np.ceil(area / _SPACING**2).astype(int))
    u, v = np.random.default_rng(_SEED).random((2, len(face), 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    points = a[face] + u * (b - a)[face] + v * (c - a)[face]
    return np.concatenate([points, mesh.vertices_V3.astype(np.float64)])


def _inside(mesh: Mesh, x_X: Floats, y_Y: Floats, z_Z: Floats) -> NDArray[np.bool_]:
    """Which nodes the surface winds around, (X, Y, Z): faces crossed on the way to z = infinity,
    those turned this way less those turned the other.
    """
    # A node's ray must not run along edges; a fraction of a millimetre aside there are none.
    x_X, y_Y = x_X + 1.37e-4, y_Y + 2.11e-4
    corners_F33 = mesh.vertices_V3[mesh.faces_F3].astype(np.float64)
    low_F, high_F = corners_F33[..., 0].min(axis=1), corners_F33[..., 0].max(axis=1)
    found = np.zeros((len(x_X), len(y_Y), len(z_Z)), bool)
    for i, x in enumerate(x_X.tolist()):
        a, b, c = corners_F33[(low_F <= x) & (high_F >= x)].transpose(1, 0, 2)
        sides = [
            (q[:, 0] - p[:, 0]) * (y_Y[:, None] - p[:, 1]) - (q[:, 1] - p[:, 1]) * (x - p[:, 0])
            for p, q in ((b, c), (c, a), (a, b))
        ]
        weight_3YF = np.stack(sides)  # barycentric, times twice the area with its sign
        turned_YF = (weight_3YF > 0).all(axis=0).astype(int) - (weight_3YF < 0).all(axis=0)
        row, face = np.nonzero(turned_YF)
        weight_3H = weight_3YF[:, row, face]
        depth_H = (weight_3H * np.stack([a, b, c])[:, face, 2]).sum(axis=0) / weight_3H.sum(axis=0)
        winding_YZ = np.zeros(found.shape[1:], int)
        np.add.at(winding_YZ, row, turned_YF[row, face, None] * (depth_H[:, None] > z_Z))
        found[i] = winding_YZ != 0
    return found


def import_meshes(
    paths: Sequence[Path], *, front: str, up: str, drawn: int = 0
) -> tuple[Tensor, list[str]]:
    """Grids (N, X, Y, Z) of the meshes, then of ``drawn`` procedural cars; and what was left out.

    A file that cannot be used never stops the others: it comes back as a sentence.
    """
    grids, refused = [], []
    for path in paths:
        try:
            grids.append(grid_of_mesh(stand_up(read_mesh(path), front=front, up=up)))
        except GessoError as error:
            refused.append(f"{path.name}: {error.message}")
    grids += list(draw_grids(drawn, _SEED)) if drawn else []
    if len(grids) < FEWEST:
        raise InvalidRequest(
            f"{len(grids)} usable shapes; a prior needs at least {FEWEST}: "
            + ("; ".join(refused) or f"the folder has no {' or '.join(SUFFIXES)} files"),
            field="meshes",
        )
    return torch.stack(grids), refused


def main(arguments: list[str] | None = None) -> int:
    """Read a folder of meshes, learn the prior, write it with a card; 2 where that cannot be."""
    parser = argparse.ArgumentParser(description="build a shape prior from meshes of cars")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--front", default="x", help="where the front is: x, -x, y, ...")
    parser.add_argument("--up", default="z", help="where the roof is")
    parser.add_argument("--drawn", type=int, default=0, help="procedural cars beside the meshes")
    options = parser.parse_args(arguments)
    paths = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    directions = {"front": options.front, "up": options.up}
    try:
        grids, refused = import_meshes(paths, **directions, drawn=options.drawn)
    except InvalidRequest as error:
        print(error.message, file=sys.stderr)
        return 2
    prior = learn(grids, min(COMPONENTS, len(grids) - 1))
    options.out.mkdir(parents=True, exist_ok=True)
    save_prior(prior, options.out)
    card = {
        "source": f"{len(paths) - len(refused)} meshes, {options.drawn} procedural cars",
        "refused": refused,
        "mean_size_hwl_m": [
            round(side, 3) for side in extent_of(prior.grid(torch.zeros(1, prior.components))).size
        ],
        "components": prior.components,
        "own_shapes": held_out(prior, grids),
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
