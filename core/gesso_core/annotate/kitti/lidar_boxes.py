"""Boxes in the frame of the LiDAR, which most tools beside KITTI want.

The frame is the scan's own: x forward, y left, z up, metres. The origin of a box is its centre, not
the middle of its bottom as in KITTI. Its own axes are x forward along its length, y to its left
and z up. Turning is counter-clockwise seen from above: about -rotation_y - pi/2, where KITTI's
angle counts the other way and from another axis.

A box that stands upright for the camera leans by the degree or less that camera and LiDAR are
tilted against each other. The rotation here keeps that, so that the eight corners stay where they
are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from gesso_core.annotate.kitti.calibration import Calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.errors import InvalidRequest

# The box's forward, left and up in the camera's frame (x right, y down, z forward) at rotation 0.
_AXES_33 = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
_RIGID = 1e-2  # how far R^T R may be from the identity in any entry; KITTI's are off by 1e-6


@dataclass(frozen=True)
class LidarBox:
    """One box: centre, length, width and height, and how it is turned."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]  # length, width, height
    rotation: Rotation  # from the box's own axes to those of the LiDAR

    @property
    def quaternion(self) -> tuple[float, float, float, float]:
        """(w, x, y, z), w >= 0."""
        w, x, y, z = self.rotation.as_quat(canonical=True, scalar_first=True).tolist()
        return w, x, y, z

    @property
    def euler(self) -> tuple[float, float, float]:
        """Angles about x, y and z in radians: R = Rx Ry Rz; the last is the yaw."""
        x, y, z = self.rotation.as_euler("XYZ").tolist()
        return x, y, z


def lidar_box(label: KittiObject, calibration: Calibration) -> LidarBox:
    """The box of a label as the LiDAR sees it.

    Raises:
        InvalidRequest: a label without a box, or a calibration that does more than turn and move.
    """
    height, width, length = label.size
    if min(label.size) <= 0:
        raise InvalidRequest(
            f"a label of the kind {label.kind} has no box in space (size {label.size})",
            field="labels",
        )
    x, y, z = label.location
    centre = calibration.velo_from_rect([[x, y - height / 2, z]])[0]
    upright = Rotation.from_matrix(_AXES_33)
    turned = Rotation.from_rotvec([0.0, label.rotation_y, 0.0]) * upright
    return LidarBox(
        (float(centre[0]), float(centre[1]), float(centre[2])),
        (length, width, height),
        camera_rotation(calibration) * turned,
    )


def camera_rotation(calibration: Calibration) -> Rotation:
    """How the rectified camera is turned in the LiDAR's frame; InvalidRequest if it is not only
    turned.
    """
    matrix = calibration.rectification @ calibration.velo_to_cam[:, :3]
    off = np.abs(matrix.T @ matrix - np.eye(3)).max()
    if off > _RIGID or np.linalg.det(matrix) < 0:
        raise InvalidRequest(
            f"{calibration.source}: R0_rect times Tr_velo_to_cam stretches or mirrors (R^T R is "
            f"off by {off:.2g}); boxes in the LiDAR frame need one that only turns and moves",
            field="calibration",
        )
    return Rotation.from_matrix(matrix).inv()


def rounded(values: ArrayLike, digits: int = 4) -> list[float]:
    """Numbers as files hold them; metres to a tenth of a millimetre."""
    return [float(value) for value in np.round(np.asarray(values, np.float64), digits) + 0.0]
