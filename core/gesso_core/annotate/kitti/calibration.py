"""The calibration of one frame: velodyne → rectified camera 0 → pixels of camera 2.

    X_rect = R0 (R_v2c X_velo + t_v2c)
    (a, b, c) = P2 (X_rect, 1);  u = a / c,  v = b / c

The divisor is c = z_rect + P2[2, 3], not z_rect.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gesso_core.annotate.geometry import Floats
from gesso_core.errors import InvalidRequest

_SIZES = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
# KITTI's raw and tracking archives spell two of the names differently.
_ALIASES = {"R_rect": "R0_rect", "Tr_velo_cam": "Tr_velo_to_cam"}


@dataclass(frozen=True)
class Calibration:
    """Camera 2 and the LiDAR of one frame; matrices as in KITTI's calib files."""

    projection: Floats  # P2, (3, 4)
    rectification: Floats  # R0, (3, 3)
    velo_to_cam: Floats  # Tr_velo_to_cam, (3, 4)

    source: str = "calibration"  # how errors call it

    def __post_init__(self) -> None:
        pairs = zip(_SIZES.items(), self._matrices(), strict=True)
        for (name, size), matrix in pairs:
            if matrix.shape != size or not np.isfinite(matrix).all():
                problem = f"needs {size[0]} x {size[1]} finite numbers"
                raise _malformed(name, problem, self.source)
        for name, square in (
            ("P2", self.projection[:, :3]),
            ("R0_rect", self.rectification),
            ("Tr_velo_to_cam", self.velo_to_cam[:, :3]),
        ):
            if abs(np.linalg.det(square)) < 1e-9:
                raise _malformed(name, "cannot be inverted", self.source)

    def _matrices(self) -> tuple[Floats, Floats, Floats]:
        return self.projection, self.rectification, self.velo_to_cam

    @classmethod
    def plain(cls, intrinsics: ArrayLike, lidar_to_camera: ArrayLike) -> "Calibration":
        """A camera without rectification: K (3, 3) and the rigid (3 or 4, 4) matrix from LiDAR."""
        k = np.asarray(intrinsics, dtype=np.float64)
        rigid = np.asarray(lidar_to_camera, dtype=np.float64)[:3]
        if k.shape != (3, 3):
            raise _malformed("intrinsics", f"needs 3 x 3 numbers, got {k.shape}")
        return cls(np.hstack([k, np.zeros((3, 1))]), np.eye(3), rigid)

    @property
    def camera_matrix(self) -> Floats:
        """K of camera 2, (3, 3)."""
        return self.projection[:, :3]

    @property
    def camera_center(self) -> Floats:
        """Where camera 2 stands in the rectified frame, (3,)."""
        return np.asarray(-np.linalg.solve(self.camera_matrix, self.projection[:, 3]), np.float64)

    @property
    def focal(self) -> float:
        """Focal length in pixels."""
        return float(self.projection[0, 0])

    def rect_from_velo(self, points_velo_N3: ArrayLike) -> Floats:
        """LiDAR points in the rectified camera frame, (N, 3) metres; a fourth column is ignored."""
        points = np.asarray(points_velo_N3, dtype=np.float64)[:, :3]
        camera = points @ self.velo_to_cam[:, :3].T + self.velo_to_cam[:, 3]
        return camera @ self.rectification.T

    def velo_from_rect(self, points_rect_N3: ArrayLike) -> Floats:
        """The inverse of `rect_from_velo`, (N, 3)."""
        points = np.asarray(points_rect_N3, dtype=np.float64)
        camera = np.linalg.solve(self.rectification, points.T).T - self.velo_to_cam[:, 3]
        return np.asarray(np.linalg.solve(self.velo_to_cam[:, :3], camera.T).T, np.float64)

    def project(self, points_rect_N3: ArrayLike) -> tuple[Floats, Floats]:
        """Pixels (N, 2) and depths c (N,).

        A point behind the camera still gets formal pixels: ask `in_image` before using them.
        """
        points = np.asarray(points_rect_N3, dtype=np.float64)
        abc = points @ self.camera_matrix.T + self.projection[:, 3]
        with np.errstate(divide="ignore", invalid="ignore"):
            return abc[:, :2] / abc[:, 2:], abc[:, 2]

    def in_image(self, points_rect_N3: ArrayLike, width: int, height: int) -> NDArray[np.bool_]:
        """Which points lie in front of the camera and project into the picture, (N,)."""
        points = np.asarray(points_rect_N3, dtype=np.float64)
        uv, _ = self.project(points)
        u, v = uv[:, 0], uv[:, 1]
        inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        return np.asarray((points[:, 2] > 0) & inside)

    def rays(self, uv_N2: ArrayLike) -> tuple[Floats, Floats]:
        """Origin (3,) and directions (N, 3), not normalised: one metre of depth per unit."""
        uv = np.asarray(uv_N2, dtype=np.float64)
        homogeneous = np.column_stack([uv, np.ones(len(uv))])
        directions = np.linalg.solve(self.camera_matrix, homogeneous.T).T
        return self.camera_center, np.asarray(directions, np.float64)


def parse_calibration(text: str, source: str = "calibration") -> Calibration:
    """Read the text of a KITTI calib file by the names of its lines.

    Raises:
        InvalidRequest: a line that is needed is missing, or holds something else than its numbers.
    """
    lines = dict(_named_numbers(text, source))
    for name in _SIZES:
        if name not in lines:
            have = ", ".join(sorted(lines)) or "no named lines"
            raise _malformed(name, f"is missing; the file has {have}", source)
    p2, r0, velo_to_cam = (_matrix(name, lines[name], source) for name in _SIZES)
    return Calibration(p2, r0, velo_to_cam, source)


def format_calibration(calibration: Calibration) -> str:
    """The three lines that `parse_calibration` reads again to the last digit."""
    named = zip(_SIZES, calibration._matrices(), strict=True)
    return "".join(f"{name}: {' '.join(map(repr, m.ravel().tolist()))}\n" for name, m in named)


def _named_numbers(text: str, source: str) -> list[tuple[str, list[str]]]:
    rows = []
    for line in filter(str.strip, text.splitlines()):
        name, _, numbers = line.replace(":", " ", 1).strip().partition(" ")
        rows.append((_ALIASES.get(name, name), numbers.split()))
    return rows


def _matrix(name: str, numbers: list[str], source: str) -> Floats:
    rows, columns = _SIZES[name]
    try:
        values = np.array([float(number) for number in numbers])
    except ValueError as error:
        raise _malformed(name, f"holds something that is no number ({error})", source) from error
    if len(values) != rows * columns:
        raise _malformed(name, f"needs {rows * columns} numbers, got {len(values)}", source)
    return values.reshape(rows, columns)


def read_calibration(path: Path) -> Calibration:
    """`parse_calibration` of a file; a missing file is named."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"{path} is missing; 3D boxes need the calibration of each frame", field="calibration"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="calibration") from error
    return parse_calibration(text, str(path))


def _malformed(name: str, problem: str, source: str = "calibration") -> InvalidRequest:
    return InvalidRequest(
        f"{source}: {name} {problem}; expected are the lines "
        "P2 (12 numbers), R0_rect (9) and Tr_velo_to_cam (12)",
        field="calibration",
    )
