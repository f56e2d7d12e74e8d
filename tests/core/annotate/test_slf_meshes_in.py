"""Meshes of cars that somebody brings along: read, stood up, and learned from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.annotate.slf.mesh_files import read_mesh
from gesso_core.annotate.slf.mesh_prior import grid_of_mesh, main, stand_up
from gesso_core.annotate.slf.meshes import Mesh, mesh_of, ply_bytes, volume
from gesso_core.annotate.slf.prior import ShapePrior, draw_grids, load_prior
from gesso_core.annotate.slf.sdf import Grid
from gesso_core.errors import InvalidRequest
from torch import Tensor

CARS = 3


@pytest.fixture(scope="module")
def grids() -> Tensor:
    return draw_grids(CARS, 123)


@pytest.fixture(scope="module")
def prior() -> ShapePrior:
    return load_prior()


@pytest.fixture(scope="module")
def meshes(grids: Tensor, prior: ShapePrior) -> list[Mesh]:
    """In the prior's frame: x forward, y down."""
    return [mesh_of(Grid(one, prior.origin_3, prior.voxel, mirrored=True)) for one in grids]


def write_obj(path: Path, mesh: Mesh) -> None:
    """As a modeller saves it: z up, the front along -y."""
    x, y, z = mesh.vertices_V3.T
    lines = [f"v {a:.6f} {b:.6f} {c:.6f} 1.0" for a, b, c in zip(z, -x, -y, strict=True)]
    lines += ["vn 0 0 1", "# a remark", "usemtl paint"]
    lines += [f"f {a}//1 {b}//1 {c}//1" for a, b, c in (mesh.faces_F3 + 1).tolist()]
    path.write_text("\n".join(lines))


def test_a_car_that_is_saved_and_imported_is_the_same_solid(
    tmp_path: Path, grids: Tensor, meshes: list[Mesh]
) -> None:
    write_obj(tmp_path / "car.obj", meshes[0])
    stood = stand_up(read_mesh(tmp_path / "car.obj"), front="-y", up="z")
    assert volume(stood) == pytest.approx(volume(meshes[0]), rel=1e-3)
    assert stood.vertices_V3[:, 1].max() == pytest.approx(0, abs=1e-5)
    found = grid_of_mesh(stood)
    true = grid_of_mesh(stand_up(meshes[0], front="x", up="-y"))
    torch.testing.assert_close(found, true, atol=0.01, rtol=0)
    near = grids[0].abs() < 0.15
    # Drawn distances are no exact ones; the inside is the same but for where the car is moved to.
    assert ((found < 0) != (grids[0] < 0)).float().mean() < 0.02
    assert (found - grids[0]).abs()[near].mean() < 0.04


def test_the_distance_is_that_to_the_surface_and_parts_may_overlap() -> None:
    body, wheel = cuboid((2.0, 0.5, 0.8), (0, -0.9, 0)), cuboid((0.3, 0.3, 0.9), (1, -0.3, 0))
    both = Mesh(
        np.concatenate([body.vertices_V3, wheel.vertices_V3]),
        np.concatenate([body.faces_F3, wheel.faces_F3 + 8]),
    )
    values = grid_of_mesh(both)
    # Nodes are 0.1 m apart from (-2.8, -2.2, 0).
    assert values[28, 13, 0] == pytest.approx(-0.5, abs=0.01)  # the middle of the body
    assert values[28, 13, 9] == pytest.approx(0.1, abs=0.01)  # beside it
    assert values[28, 5, 0] == pytest.approx(0.3, abs=0.01)  # above it
    assert values[38, 17, 0] < 0  # in body and wheel at once
    assert values[38, 21, 0] == pytest.approx(-0.1, abs=0.01)  # in the wheel alone
    assert values[28, 21, 0] > 0  # between the wheels


def cuboid(half: tuple[float, float, float], centre: tuple[float, float, float]) -> Mesh:
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    points = signs * np.array(half) + np.array(centre)
    return Mesh(points.astype(np.float32), np.array(faces, np.uint32))


def test_ply_comes_in_text_and_in_both_byte_orders(tmp_path: Path) -> None:
    box = cuboid((2.0, 0.7, 0.8), (0, -0.7, 0))
    (tmp_path / "ours.ply").write_bytes(ply_bytes(box))
    head = (
        "ply\nformat {} 1.0\ncomment by hand\nelement vertex 8\nproperty double x\n"
        "property double y\nproperty double z\nproperty uchar red\nelement face 12\n"
        "property list uchar int vertex_indices\nproperty uchar flag\nend_header\n"
    )
    rows = [" ".join(map(repr, [*map(float, row), 7])) for row in box.vertices_V3]
    rows += [f"3 {a} {b} {c} 1" for a, b, c in box.faces_F3.tolist()]
    (tmp_path / "text.ply").write_text(head.format("ascii") + "\n".join(rows) + "\n")
    vertices = np.zeros(8, [("at", ">f8", 3), ("red", "u1")])
    vertices["at"] = box.vertices_V3
    faces = np.zeros(12, [("n", "u1"), ("corners", ">i4", 3), ("flag", "u1")])
    faces["n"], faces["corners"] = 3, box.faces_F3
    (tmp_path / "big.ply").write_bytes(
        head.format("binary_big_endian").encode() + vertices.tobytes() + faces.tobytes()
    )
    for name in ("ours.ply", "text.ply", "big.ply"):
        found = read_mesh(tmp_path / name)
        np.testing.assert_allclose(found.vertices_V3, box.vertices_V3)
        np.testing.assert_array_equal(found.faces_F3, box.faces_F3)


def test_faces_of_many_corners_and_counted_backwards_are_read(tmp_path: Path) -> None:
    (tmp_path / "fan.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4/1 -3/2 -2/3 -1/4\n")
    assert read_mesh(tmp_path / "fan.obj").faces_F3.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.stl", "solid", "ends in none of .obj, .ply"),
        ("a.obj", "v 0 0 0\n", "has no faces"),
        ("a.obj", "v 0 0 x\nf 1 1 1\n", "is damaged"),
        ("a.obj", "v 0 0 0\nf 1 2 3\n", "vertices that it does not have"),
        ("a.ply", "plywood", "no PLY header"),
        ("a.ply", "ply\nformat ascii 1.0\nelement vertex 9\nproperty float x\nend_header\n1\n",
         "is damaged"),
        ("a.ply", "ply\nformat binary_little_endian 1.0\nelement face 1\n"
         "property list uchar int v\nend_header\n\3\0", "is damaged"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_mesh_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=problem) as refused:
        read_mesh(tmp_path / name)
    assert name in refused.value.message


def test_a_mesh_with_a_hole_or_in_millimetres_or_lying_down_is_refused() -> None:
    box = cuboid((2.0, 0.7, 0.8), (0, -0.7, 0))
    with pytest.raises(InvalidRequest, match="not watertight: 3 open edges"):
        grid_of_mesh(Mesh(box.vertices_V3, box.faces_F3[1:]))
    with pytest.raises(InvalidRequest, match=r"4000.00 m long.*in metres"):
        stand_up(Mesh(box.vertices_V3 * 1000, box.faces_F3), front="x", up="-y")
    with pytest.raises(InvalidRequest, match=r"1.40 m long.* 4.00 m high"):
        stand_up(box, front="y", up="x")
    with pytest.raises(InvalidRequest, match="along one axis"):
        stand_up(box, front="x", up="-x")


def test_a_folder_becomes_a_prior_that_loads_and_the_bad_file_a_sentence(
    tmp_path: Path, meshes: list[Mesh], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cars"
    (folder / "more").mkdir(parents=True)
    for n, mesh in enumerate(meshes):
        write_obj(folder / "more" / f"{n}.obj", mesh)
    (folder / "broken.ply").write_text("junk")
    assert main([str(folder), "--out", str(tmp_path / "mine"), "--front=-y"]) == 0
    mine = load_prior(folder=tmp_path / "mine")
    assert mine.components == CARS - 1
    assert len(mine.sha256) == 64
    assert "broken.ply" in capsys.readouterr().out
    own = grid_of_mesh(stand_up(meshes[0], front="x", up="-y"))
    found = mine.grid(mine.encode(own[None])).values[0]  # three shapes span themselves
    torch.testing.assert_close(found, own, atol=0.02, rtol=0)
    assert main([str(folder / "none"), "--out", str(tmp_path)]) == 2
    assert "needs at least 3: the folder has no .obj or .ply files" in capsys.readouterr().err
