"""Labels of cars as other tools read them: nuScenes, OpenLABEL, SUSTechPOINTS.

KITTI's own label files are written by `labels`. All of these are in the frame of the LiDAR (x
forward, y left, z up, metres), with the centre of the box as its origin; the calibration of the
frame leads there. A DontCare region has no box in space and is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, Final

import numpy as np

from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.kitti.lidar_boxes import LidarBox, camera_rotation, lidar_box, rounded

Json = dict[str, Any]
LIDAR, CAMERA = "lidar", "camera"
IMAGE_ONLY: Final = "image_only"
_TURNS: Final = 7  # digits of quaternions and angles


@dataclass(frozen=True)
class Labelled:
    """One object, and why a person should look at it."""

    label: KittiObject
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledFrame:
    """All objects of one picture; ``name`` is that of its file, ``size`` height and width."""

    name: str
    size: tuple[int, int]
    calibration: Calibration
    objects: Sequence[Labelled]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePath(self.name).stem

    def boxes(self) -> list[tuple[Labelled, LidarBox]]:
        """The objects that have a box, with it; InvalidRequest for a calibration that stretches."""
        return [
            (one, lidar_box(one.label, self.calibration))
            for one in self.objects
            if not one.label.is_dont_care
        ]


def nuscenes(frames: Iterable[LabelledFrame]) -> Json:
    """Results as nuScenes takes detections: a list of boxes per sample.

    * frame: that of the LiDAR, x forward, y left, z up; nuScenes' own is a map, which a single
      frame does not know.
    * origin: ``translation`` is the centre of the box.
    * sizes: ``size`` is width, length, height.
    * angle: ``rotation`` is the quaternion (w, x, y, z) from the box's axes (x forward, y left,
      z up); a yaw grows counter-clockwise seen from above, 0 along +x.

    Velocities are not known and written as 0. ``flags`` is ours; the devkit passes over it.
    """
    results, seen = {}, set()
    for frame in frames:
        results[frame.stem] = [_sample(frame.stem, one, box) for one, box in frame.boxes()]
        seen |= {flag for one in frame.objects for flag in one.flags}
    used = {"camera": True, "lidar": IMAGE_ONLY not in seen}
    meta: Json = {
        f"use_{sensor}": used.get(sensor, False)
        for sensor in ("camera", "lidar", "radar", "map", "external")
    }
    meta["frame"] = "LiDAR of each sample: x forward, y left, z up"
    return {"meta": meta, "results": results}


def _sample(token: str, one: Labelled, box: LidarBox) -> Json:
    length, width, height = box.size
    return {
        "sample_token": token,
        "translation": rounded(box.centre),
        "size": rounded((width, length, height)),
        "rotation": rounded(box.quaternion, _TURNS),
        "velocity": [0.0, 0.0],
        "detection_name": one.label.kind.lower(),
        "detection_score": _score(one.label),
        "attribute_name": "",
        "flags": list(one.flags),
    }


def openlabel(frame: LabelledFrame) -> Json:
    """One frame as ASAM OpenLABEL 1.0.0.

    * frame: coordinate system ``lidar``, x forward, y left, z up. ``camera`` is the rectified one
      (x right, y down, z forward) with its pose in ``lidar`` and the 3 x 4 projection.
    * origin: a cuboid's first three numbers are the centre of the box.
    * sizes: the last three are length, width, height along the box's x forward, y left, z up.
    * angle: the four between are the quaternion (x, y, z, w) from those axes; a yaw grows
      counter-clockwise seen from above, 0 along +x.

    A ``bbox`` is centre and size in pixels of the picture.
    """
    objects = {
        str(n): {
            "name": f"{one.label.kind} {n}",
            "type": one.label.kind,
            "object_data": {"cuboid": [_cuboid(one, box)], "bbox": [_bbox(one.label)]},
        }
        for n, (one, box) in enumerate(frame.boxes())
    }
    metadata = {
        "schema_version": "1.0.0",
        "name": frame.stem,
        "annotator": f"gesso {version('gesso')}",
        "tagged_file": frame.name,
    }
    return {
        "openlabel": {
            "metadata": metadata,
            "coordinate_systems": _coordinate_systems(frame.calibration),
            "streams": _streams(frame),
            "objects": objects,
        }
    }


def _cuboid(one: Labelled, box: LidarBox) -> Json:
    w, x, y, z = box.quaternion
    numbers = {
        "score": _score(one.label),
        "truncated": round(one.label.truncated, 4),
        "occluded": one.label.occluded,
    }
    return {
        "name": "box",
        "val": rounded(box.centre) + rounded((x, y, z, w), _TURNS) + rounded(box.size),
        "coordinate_system": LIDAR,
        "attributes": {
            "num": [{"name": name, "val": value} for name, value in numbers.items()],
            "vec": [{"name": "flags", "val": list(one.flags)}],
        },
    }


def _bbox(label: KittiObject) -> Json:
    left, top, right, bottom = label.box2d
    centre_and_size = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return {"name": "picture", "val": rounded(centre_and_size, 2), "coordinate_system": CAMERA}


def _coordinate_systems(calibration: Calibration) -> Json:
    x, y, z, w = camera_rotation(calibration).as_quat(canonical=True)
    pose = {
        "quaternion": rounded((x, y, z, w), _TURNS),
        "translation": rounded(calibration.velo_from_rect(np.zeros((1, 3)))[0]),
    }
    return {
        LIDAR: {"type": "sensor", "parent": "", "children": [CAMERA]},
        CAMERA: {"type": "sensor", "parent": LIDAR, "children": [], "pose_wrt_parent": pose},
    }


def _streams(frame: LabelledFrame) -> Json:
    height, width = frame.size
    intrinsics = {
        "camera_matrix": frame.calibration.projection.ravel().tolist(),
        "distortion_coeffs": [0.0] * 5,
        "width_px": width,
        "height_px": height,
    }
    return {
        LIDAR: {"type": "lidar"},
        CAMERA: {
            "type": "camera",
            "uri": frame.name,
            "stream_properties": {"intrinsics_pinhole": intrinsics},
        },
    }


def sustech(frame: LabelledFrame) -> list[Json]:
    """One frame as SUSTechPOINTS keeps it in ``label/NAME.json``.

    * frame: that of the LiDAR, x forward, y left, z up.
    * origin: ``position`` is the centre of the box.
    * sizes: ``scale`` is length (x), width (y), height (z) along the box's own axes.
    * angle: ``rotation`` holds the angles about x, y and z, R = Rx Ry Rz, in radians; z is the
      yaw, counter-clockwise seen from above, 0 along +x. x and y are the slight lean of the LiDAR
      against the camera.
    """
    return [
        {
            "obj_id": str(n),
            "obj_type": one.label.kind,
            "obj_attr": ",".join(one.flags),
            "score": _score(one.label),
            "psr": {
                "position": _xyz(box.centre),
                "scale": _xyz(box.size),
                "rotation": _xyz(box.euler, _TURNS),
            },
        }
        for n, (one, box) in enumerate(frame.boxes(), start=1)
    ]


def _xyz(values: tuple[float, float, float], digits: int = 4) -> Json:
    return dict(zip("xyz", rounded(values, digits), strict=True))


def _score(label: KittiObject) -> float:
    """A label that a person drew has no score: it is sure."""
    return 1.0 if label.score is None else round(label.score, 4)
