"""Calibration files, label lines, point clouds and folders of KITTI."""

from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.kitti.calibration import Calibration, parse_calibration, read_calibration
from gesso_core.annotate.kitti.dataset import open_folder, parse_points
from gesso_core.annotate.kitti.labels import KittiObject, format_labels, parse_labels
from gesso_core.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

CALIBRATION = """P0: 700 0 600 0 0 700 180 0 0 0 1 0
P2: 700 0 600 45 0 700 180 -0.3 0 0 1 0.005
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0.01 0 0 -1 -0.07 1 0 0 -0.28

"""
LABELS = """Car 0.88 3 -0.69 0.00 192.37 402.31 374.00 1.60 1.57 3.23 -2.70 1.74 3.68 -1.29
DontCare -1 -1 -10 800.38 163.67 825.45 184.07 -1 -1 -1 -1000 -1000 -1000 -10
Pedestrian 0.00 0 0.21 423.17 173.67 433.17 224.03 1.60 0.38 0.30 -5.87 1.63 23.11 -0.03
"""


@pytest.mark.parametrize("name", ["P2", "R0_rect", "Tr_velo_to_cam"])
def test_a_missing_calibration_line_is_named(name: str) -> None:
    lines = [line for line in CALIBRATION.splitlines() if not line.startswith(name)]
    with pytest.raises(InvalidRequest, match=f"{name} is missing"):
        parse_calibration("\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("R0_rect: 1 0", "R0_rect: 1", "needs 9 numbers, got 8"),
        ("R0_rect: 1 0", "R0_rect: one 0", "no number"),
        ("R0_rect: 1 0", "R0_rect: nan 0", "finite"),
        ("R0_rect: 1 0", "R0_rect: 0 0", "inverted"),
    ],
)
def test_a_malformed_calibration_line_is_refused(old: str, new: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        parse_calibration(CALIBRATION.replace(old, new), "000001.txt")
    assert refused.value.field == "calibration"
    assert "000001.txt" in refused.value.message


def test_a_missing_calibration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"7\.txt is missing"):
        read_calibration(tmp_path / "7.txt")


@given(st.floats(-20, 20), st.floats(-3, 3), st.floats(1, 80))  # anywhere in front of the camera
def test_a_point_lies_on_the_ray_of_its_pixel(x: float, y: float, z: float) -> None:
    calibration = parse_calibration(CALIBRATION)
    uv, depth = calibration.project([[x, y, z]])
    origin, rays = calibration.rays(uv)
    np.testing.assert_allclose(origin + depth[:, None] * rays, [[x, y, z]], atol=1e-9)
    velo = calibration.velo_from_rect([[x, y, z]])
    np.testing.assert_allclose(calibration.rect_from_velo(velo), [[x, y, z]], atol=1e-9)


def test_the_raw_archives_spelling_is_understood() -> None:
    raw = CALIBRATION.replace("R0_rect:", "R_rect").replace("Tr_velo_to_cam:", "Tr_velo_cam")
    assert parse_calibration(raw).focal == 700


def test_a_plain_camera_needs_no_kitti_file() -> None:
    forward = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    calibration = Calibration.plain([[500, 0, 320], [0, 500, 240], [0, 0, 1]], forward)
    uv, depth = calibration.project(calibration.rect_from_velo([[10.0, -1.0, 0.0]]))
    np.testing.assert_allclose((*uv[0], *depth), (370, 240, 10))


def test_label_lines_survive_the_round_trip_to_the_letter() -> None:
    assert format_labels(parse_labels(LABELS)) == LABELS


def test_a_result_has_sixteen_columns_and_four_digits_of_score() -> None:
    item = KittiObject(
        kind="Car", truncated=0.0, occluded=1, alpha=-0.001, box2d=(1, 2, 3, 4), size=(1.5, 1.6, 4),
        location=(1, 1.7, 20), rotation_y=3.14159, score=0.123456,
    )  # fmt: skip
    line = format_labels([item])
    assert line == (
        "Car 0.00 1 0.00 1.00 2.00 3.00 4.00 1.50 1.60 4.00 1.00 1.70 20.00 3.14 0.1235\n"
    )
    assert parse_labels(line)[0].score == 0.1235


def test_a_picture_without_objects_has_an_empty_file() -> None:
    assert parse_labels(format_labels([])) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [("Car 0 0", "3 columns"), ("Car " + "x " * 14, "float"), ("Car " + "nan " * 14, "finite")],
)
def test_a_bad_label_line_is_refused_with_its_number(line: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=f"line 2.*{problem}"):
        parse_labels("\n" + line, "000003.txt")


def test_a_point_cloud_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="17 bytes"):
        parse_points(bytes(17))


def test_points_that_no_lidar_can_have_seen_are_left_out() -> None:
    cloud = np.array(
        [[1, 2, 3, 0.5], [np.nan, 0, 0, 0], [4, 5, np.inf, 1], [1e38, 0, 0, 1]], np.float32
    )
    assert parse_points(cloud.tobytes()).tolist() == [[1, 2, 3, 0.5]]


def test_a_folder_lists_its_frames_by_name(tmp_path: Path) -> None:
    for part, name in (("image_2", "000010.png"), ("image_2", "000002.PNG")):
        (tmp_path / "training" / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(tmp_path / "training" / part / name)
    frames = list(open_folder(tmp_path))
    assert [frame.name for frame in frames] == ["000002", "000010"]
    assert frames[0].picture().shape == (4, 6, 3)
    assert frames[0].labels() == []
    assert not frames[0].has_points
    with pytest.raises(InvalidRequest, match="calib"):
        frames[0].calibration()


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no KITTI folder"):
        open_folder(tmp_path)
