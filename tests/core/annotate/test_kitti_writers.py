"""Labels in other tools' files: read again as those tools do, the corners are where they were."""

import math
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from gesso_core.annotate.kitti.boxes import corners
from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.kitti.writers import Labelled, LabelledFrame, nuscenes, openlabel, sustech
from gesso_core.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float64]
INTRINSICS = [[700, 0, 600], [0, 700, 180], [0, 0, 1]]
FORWARD = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # from LiDAR to camera axes
# Front left, front right, rear right, rear left: of the bottom, then of the top.
CORNERS = np.array([(x, y, z) for z in (-1, 1) for x, y in ((1, 1), (1, -1), (-1, -1), (-1, 1))])


def turn(axis: int, angle: float) -> Floats:
    """A right-handed turn about x, y or z."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[[i, j], [i, j]] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def calibration(tilt: tuple[float, float, float] = (0, 0, 0)) -> Calibration:
    """A camera beside a LiDAR that is turned against it a little."""
    rotation = turn(0, tilt[0]) @ turn(1, tilt[1]) @ turn(2, tilt[2]) @ FORWARD
    return Calibration.plain(INTRINSICS, np.column_stack([rotation, (0.02, -0.07, -0.28)]))


def frame(label: KittiObject, camera: Calibration, *flags: str) -> LabelledFrame:
    beside = KittiObject(kind="DontCare", box2d=(0, 0, 5, 5))
    return LabelledFrame(
        "000007.png", (375, 1242), camera, [Labelled(beside), Labelled(label, flags)]
    )


def box(centre: Any, size_lwh: Any, rotation_33: Floats) -> Floats:
    """Corners (8, 3) of a box given by its centre, length, width, height and turn."""
    return CORNERS / 2 * np.asarray(size_lwh) @ rotation_33.T + np.asarray(centre)


def from_quaternion(w: float, x: float, y: float, z: float) -> Floats:
    v = np.array([x, y, z])
    cross = -np.cross(np.eye(3), v).T  # cross @ p is v x p
    return (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross


def read_nuscenes(made: LabelledFrame) -> Floats:
    (one,) = nuscenes([made])["results"]["000007"]
    width, length, height = one["size"]
    return box(one["translation"], (length, width, height), from_quaternion(*one["rotation"]))


def read_openlabel(made: LabelledFrame) -> Floats:
    (one,) = openlabel(made)["openlabel"]["objects"].values()
    (cuboid,) = one["object_data"]["cuboid"]
    x, y, z, w = cuboid["val"][3:7]
    return box(cuboid["val"][:3], cuboid["val"][7:], from_quaternion(w, x, y, z))


def read_sustech(made: LabelledFrame) -> Floats:
    (one,) = sustech(made)
    place, size, angles = (
        [one["psr"][part][axis] for axis in "xyz"] for part in ("position", "scale", "rotation")
    )
    rotation = turn(0, angles[0]) @ turn(1, angles[1]) @ turn(2, angles[2])
    return box(place, size, rotation)


SMALL = st.floats(-0.1, 0.1)
METRES = st.floats(0.5, 8.0)


@pytest.mark.parametrize("read", [read_nuscenes, read_openlabel, read_sustech])
@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(METRES, METRES, METRES),
    place=st.tuples(st.floats(-40, 40), st.floats(-3, 3), st.floats(1, 80)),
    angle=st.floats(-math.pi, math.pi),
    tilt=st.tuples(SMALL, SMALL, SMALL),
)
def test_the_eight_corners_come_back_front_first(
    read: Callable[[LabelledFrame], Floats], size: Any, place: Any, angle: float, tilt: Any
) -> None:
    label = KittiObject(
        kind="Car", box2d=(0, 0, 9, 9), size=size, location=place, rotation_y=angle, score=0.5
    )
    camera = calibration(tilt)
    found = camera.rect_from_velo(read(frame(label, camera)))
    np.testing.assert_allclose(found, corners([label.box3d])[0], atol=1e-3)


AHEAD = KittiObject(
    kind="Car",
    truncated=0.25,
    occluded=1,
    box2d=(10, 20, 40, 60),
    size=(1.5, 1.6, 4.0),
    location=(2.0, 1.7, 10.0),
    rotation_y=-math.pi / 2,  # drives the way the camera looks
    score=0.87654,
)


def test_a_car_that_drives_ahead_is_turned_by_nothing_in_the_lidar_frame() -> None:
    made = frame(AHEAD, calibration(), "few_points")
    centre = [10.28, -1.98, -1.02]  # forward, to the right, half its height above the ground
    result = nuscenes([made])
    (one,) = result["results"]["000007"]
    assert one["translation"] == pytest.approx(centre)
    assert one["size"] == [1.6, 4.0, 1.5]
    assert one["rotation"] == pytest.approx([1, 0, 0, 0])
    assert (one["detection_name"], one["detection_score"]) == ("car", 0.8765)
    assert (result["meta"]["use_lidar"], one["flags"]) == (True, ["few_points"])
    (labelled,) = sustech(made)
    assert labelled["psr"] == {
        "position": dict(zip("xyz", centre, strict=True)),
        "scale": {"x": 4.0, "y": 1.6, "z": 1.5},
        "rotation": {"x": 0.0, "y": 0.0, "z": 0.0},
    }
    assert (labelled["obj_id"], labelled["obj_type"]) == ("1", "Car")
    (thing,) = openlabel(made)["openlabel"]["objects"].values()
    assert thing["object_data"]["cuboid"][0]["val"] == [*centre, 0, 0, 0, 1, 4.0, 1.6, 1.5]
    assert thing["object_data"]["bbox"][0]["val"] == [25, 40, 30, 40]


def test_boxes_without_a_scan_do_not_claim_to_have_used_one() -> None:
    made = nuscenes([frame(AHEAD, calibration(), "image_only")])
    assert made["meta"]["use_lidar"] is False


NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
NAMED: dict[str, Any] = {"type": "object", "required": ["name", "val"]}
# What ASAM's schema of OpenLABEL 1.0.0 demands of the parts that are written here.
DEMANDED: dict[str, Any] = {
    "type": "object",
    "required": ["metadata"],
    "additionalProperties": False,
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["schema_version"],
            "properties": {"schema_version": {"enum": ["1.0.0"]}},
        },
        "coordinate_systems": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["type", "parent"],
                "properties": {
                    "pose_wrt_parent": {
                        "type": "object",
                        "required": ["quaternion", "translation"],
                        "additionalProperties": False,
                        "properties": {
                            "quaternion": NUMBERS | {"minItems": 4, "maxItems": 4},
                            "translation": NUMBERS | {"minItems": 3, "maxItems": 3},
                        },
                    }
                },
            },
        },
        "streams": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": ["camera", "lidar", "radar", "gps_imu", "other"]},
                    "uri": {"type": "string"},
                    "stream_properties": {
                        "properties": {
                            "intrinsics_pinhole": {
                                "properties": {
                                    "camera_matrix": NUMBERS | {"minItems": 12, "maxItems": 12},
                                    "distortion_coeffs": NUMBERS | {"minItems": 5},
                                    "width_px": {"type": "integer"},
                                    "height_px": {"type": "integer"},
                                }
                            }
                        }
                    },
                },
            },
        },
        "objects": {
            "type": "object",
            "additionalProperties": False,
            "patternProperties": {
                "^-?[0-9]+$": {
                    "type": "object",
                    "required": ["name", "type"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string"},
                        "type": {"type": "string"},
                        "object_data": {
                            "additionalProperties": False,
                            "properties": {
                                "cuboid": {
                                    "items": NAMED
                                    | {
                                        "properties": {
                                            "val": NUMBERS | {"minItems": 9, "maxItems": 10}
                                        }
                                    }
                                },
                                "bbox": {
                                    "items": NAMED
                                    | {
                                        "properties": {
                                            "val": NUMBERS | {"minItems": 4, "maxItems": 4}
                                        }
                                    }
                                },
                            },
                        },
                    },
                }
            },
        },
    },
}


def test_openlabel_has_what_its_schema_demands_and_its_camera_projects() -> None:
    camera = calibration((0.01, -0.02, 0.03))
    (root,) = (made := openlabel(frame(AHEAD, camera, "occluded"))).values()
    assert list(made) == ["openlabel"]
    jsonschema.validate(root, DEMANDED)
    pose = root["coordinate_systems"]["camera"]["pose_wrt_parent"]
    x, y, z, w = pose["quaternion"]
    rotation, there = from_quaternion(w, x, y, z), np.array(pose["translation"])
    point = np.array([3.0, 1.0, 20.0])  # of the camera's frame
    np.testing.assert_allclose(
        rotation @ point + there, camera.velo_from_rect([point])[0], atol=1e-3
    )
    matrix = root["streams"]["camera"]["stream_properties"]["intrinsics_pinhole"]["camera_matrix"]
    u, v, depth = np.reshape(matrix, (3, 4)) @ [*point, 1]
    np.testing.assert_allclose([u / depth, v / depth], camera.project([point])[0][0])


@pytest.mark.parametrize("change", [np.diag([1.0, 1.0, 1.1]), np.diag([1.0, 1.0, -1.0])])
def test_a_calibration_that_stretches_or_mirrors_has_no_boxes_in_the_lidar_frame(
    change: Floats,
) -> None:
    rigid = np.column_stack([change @ FORWARD, np.zeros(3)])
    with pytest.raises(InvalidRequest, match="stretches or mirrors") as refused:
        sustech(frame(AHEAD, Calibration.plain(INTRINSICS, rigid)))
    assert refused.value.field == "calibration"


def test_a_label_of_the_picture_alone_has_no_box_to_write() -> None:
    flat = KittiObject(kind="Car", box2d=(0, 0, 9, 9))
    with pytest.raises(InvalidRequest, match="no box in space"):
        nuscenes([frame(flat, calibration())])
