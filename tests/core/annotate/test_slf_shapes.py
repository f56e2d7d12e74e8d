"""Distance grids, the procedural cars and their prior, meshes."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from gesso_core.annotate.slf.meshes import glb_bytes, mesh_of, ply_bytes, volume
from gesso_core.annotate.slf.prior import (
    ShapePrior,
    draw_grids,
    extent_of,
    grid_of,
    held_out,
    learn,
    load_prior,
    save_prior,
)
from gesso_core.annotate.slf.procedural_cars import (
    BODY_STYLES,
    car_distance,
    draw_car,
    polygon_distance,
)
from gesso_core.annotate.slf.sdf import (
    Grid,
    Pose,
    camera_from_object,
    object_from_camera,
    sample,
    sample_nearest,
)
from gesso_core.annotate.slf.silhouettes import silhouette
from gesso_core.errors import InvalidRequest, WeightsError
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def prior() -> ShapePrior:
    return load_prior()


def ball(radius: float = 1.0, voxel: float = 0.1) -> Grid:
    axis = torch.arange(-15, 16) * voxel
    x, y, z = torch.meshgrid(axis, axis, axis[15:], indexing="ij")
    values = (x**2 + y**2 + z**2).sqrt() - radius
    return Grid(values, torch.tensor([-1.5, -1.5, 0.0]), voxel, mirrored=True)


def test_distances_hold_inside_the_grid_and_beyond_it() -> None:
    points = torch.tensor([[[0.5, 0.0, 0.0], [0.0, 0.0, -1.2], [0.0, -4.0, 0.0]]])
    torch.testing.assert_close(
        sample(ball(), points)[0], torch.tensor([-0.5, 0.2, 3.0]), atol=0.01, rtol=0
    )


def test_slopes_point_away_from_the_surface() -> None:
    points = torch.tensor([[[0.6, 0.6, -0.5], [3.0, 0.5, 0.2]]], requires_grad=True)
    (slope,) = torch.autograd.grad(sample(ball(), points).sum(), points)
    expected = points.detach()[0, 0] / points.detach()[0, 0].norm()
    torch.testing.assert_close(slope[0, 0], expected, atol=0.06, rtol=0)
    assert slope[0, 1, 0] > 0.9


def test_the_quick_search_is_right_to_half_a_voxel() -> None:
    points = torch.rand(2, 500, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = ball()
    difference = sample_nearest(grid, points.unbind(-1)) - sample(grid, points)
    assert difference.abs().max() < 0.1 * math.sqrt(3) / 2 + 0.01


def test_a_point_that_is_no_number_has_no_distance_and_stops_nothing() -> None:
    points = torch.tensor([[[0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]]])
    inside, unknown = sample(ball(), points)[0].tolist()
    assert inside < 0
    assert math.isnan(unknown)
    assert sample_nearest(ball(), points.unbind(-1)).shape == (1, 2)


def test_poses_are_undone() -> None:
    pose = Pose.from_rows(torch.tensor([[1.0, 1.7, 20.0, 0.4], [0.0, 0.0, 5.0, -2.0]]))
    points = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    back = camera_from_object(object_from_camera(points, pose), pose)
    torch.testing.assert_close(back, points, atol=1e-5, rtol=0)


def test_a_balls_silhouette_is_a_disc() -> None:
    angles = torch.linspace(-0.2, 0.2, 81)
    rays = torch.stack([angles.sin(), torch.zeros(81), angles.cos()], dim=-1)[None]
    # The search is centred where the middle of a car would be.
    pose = Pose.from_rows(torch.tensor([[0.0, 0.0, 10.0, 0.7]]))
    drawn = silhouette(ball(), pose, torch.zeros(1, 3), rays)[0] > 0.5
    edge = math.asin(1 / 10)
    assert drawn.tolist() == (angles.abs() < edge).tolist()


def test_polygon_distances_are_exact() -> None:
    square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    points = np.array([[1.0, 1], [1.5, 1], [5, 6], [-1, 1]])
    np.testing.assert_allclose(polygon_distance(square, points), [-1, -0.5, 5, 1])


@pytest.mark.parametrize("style", BODY_STYLES)
def test_a_procedural_car_fills_its_box_and_stands_on_its_wheels(style: str) -> None:
    car = draw_car(np.random.default_rng(3), style)
    extent = extent_of(Grid(grid_of(car), torch.tensor([-2.8, -2.2, 0.0]), 0.1, mirrored=True))
    assert extent.size == pytest.approx((car.height, car.width, car.length), abs=0.06)
    assert extent.bottom == pytest.approx(0, abs=0.05)
    middle = np.array([0.0]), np.array([-0.6]), np.array([0.0])
    assert car_distance(car, *middle)[0, 0, 0] < 0


def test_the_shipped_prior_describes_cars_it_has_not_seen(prior: ShapePrior) -> None:
    measured = held_out(prior, draw_grids(10, seed=12345))
    assert measured["iou_mean"] > 0.96
    assert measured["surface_error_m"] < 0.015


def test_the_mean_car_has_the_size_of_kittis(prior: ShapePrior) -> None:
    size = extent_of(prior.grid(torch.zeros(1, prior.components))).size
    assert size == pytest.approx((1.53, 1.63, 3.88), abs=0.08)


def test_the_same_cars_give_the_same_file_to_the_byte(tmp_path) -> None:
    values = draw_grids(12, seed=5)
    first, second = learn(values, components=4), learn(values, components=4)
    torch.testing.assert_close(first.components_KXYZ, second.components_KXYZ, atol=0, rtol=0)
    save_prior(first, tmp_path)
    save_prior(second, tmp_path / "again")
    files = [folder / "prior.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = load_prior(folder=tmp_path)
    torch.testing.assert_close(again.mean_XYZ, first.mean_XYZ, atol=1e-3, rtol=0)
    # The codes of the cars it was made of have unit variance.
    codes = first.encode(values)
    torch.testing.assert_close(codes.std(dim=0), torch.ones(4), atol=1e-3, rtol=0)


def test_a_class_without_a_prior_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="no shape prior for 'Pedestrian'"):
        load_prior("Pedestrian")


def test_a_file_that_is_no_prior_is_refused(tmp_path) -> None:
    save_file({"mean": torch.zeros(2, 2, 2)}, tmp_path / "prior.safetensors")
    with pytest.raises(WeightsError, match="no shape prior"):
        load_prior(folder=tmp_path)


def test_a_mesh_is_closed_and_turns_outwards(prior: ShapePrior) -> None:
    mesh = mesh_of(prior.grid(torch.zeros(1, prior.components)))
    edges = np.sort(mesh.faces_F3[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, uses = np.unique(edges, axis=0, return_counts=True)
    assert set(uses) == {2}
    assert 3.0 < volume(mesh) < 9.0
    np.testing.assert_allclose(volume(mesh_of(ball())), 4 / 3 * math.pi, rtol=0.02)


def test_a_ply_file_holds_the_mesh(prior: ShapePrior) -> None:
    mesh = mesh_of(ball())
    header, _, body = ply_bytes(mesh).partition(b"end_header\n")
    assert f"element vertex {len(mesh.vertices_V3)}\n".encode() in header
    corners = np.frombuffer(body[: mesh.vertices_V3.nbytes], "<f4").reshape(-1, 3)
    np.testing.assert_array_equal(corners, mesh.vertices_V3)
    assert len(body) == mesh.vertices_V3.nbytes + 13 * len(mesh.faces_F3)


def test_a_glb_file_says_how_long_its_parts_are() -> None:
    mesh = mesh_of(ball())
    data = glb_bytes(mesh)
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    scene = json.loads(data[20 : 20 + size])
    assert kind == b"JSON"
    assert scene["accessors"][1]["count"] == mesh.faces_F3.size
    binary, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert (kind, binary) == (b"BIN\0", scene["buffers"][0]["byteLength"])
    first = struct.unpack_from("<fff", data, 28 + size)
    assert first == pytest.approx(tuple(mesh.vertices_V3[0] * (1, -1, -1)))
