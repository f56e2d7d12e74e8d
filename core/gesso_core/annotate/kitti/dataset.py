"""A KITTI object folder: ``image_2``, ``velodyne``, ``calib`` and, where there are, ``label_2``."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.kitti.calibration import Calibration, read_calibration
from gesso_core.annotate.kitti.labels import KittiObject, read_labels
from gesso_core.annotate.pictures import open_picture
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels

_PICTURES = (".png", ".jpg", ".jpeg")
_BYTES_PER_POINT = 16  # x, y, z, reflectance in float32
_FARTHEST = 10_000.0  # metres


def parse_points(data: bytes, source: str = "point cloud") -> NDArray[np.float32]:
    """LiDAR returns (N, 4): x, y, z in metres, reflectance.

    Those that are not finite, or farther away than any LiDAR sees, are left out.

    Raises:
        InvalidRequest: a length that is not a whole number of points.
    """
    if len(data) % _BYTES_PER_POINT:
        raise InvalidRequest(
            f"{source}: {len(data)} bytes are no whole number of points; a KITTI point cloud has "
            f"{_BYTES_PER_POINT} bytes per point (x, y, z, reflectance as float32)",
            field="points",
        )
    points = np.frombuffer(data, dtype="<f4").reshape(-1, 4)
    near = (np.abs(points[:, :3]) <= _FARTHEST).all(axis=1)  # so says no NaN
    return np.ascontiguousarray(points[near & np.isfinite(points[:, 3])])


def read_points(path: Path) -> NDArray[np.float32]:
    """`parse_points` of a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="points") from error
    return parse_points(data, str(path))


@dataclass(frozen=True)
class KittiFrame:
    """One frame; its files are read when asked for."""

    root: Path
    name: str

    @cached_property
    def picture_path(self) -> Path:
        """The picture of camera 2."""
        for suffix in (*_PICTURES, *map(str.upper, _PICTURES)):
            path = self.root / "image_2" / f"{self.name}{suffix}"
            if path.exists():
                return path
        raise InvalidRequest(f"{self.root / 'image_2'} has no picture {self.name}", field="image")

    def picture(self) -> Pixels:
        """The picture, uint8 RGB (H, W, 3)."""
        return open_picture(self.picture_path)

    def calibration(self) -> Calibration:
        """Raises InvalidRequest where the file is missing or malformed."""
        return read_calibration(self.root / "calib" / f"{self.name}.txt")

    @property
    def has_points(self) -> bool:
        """Whether there is a LiDAR scan."""
        return self._points_path.exists()

    @property
    def _points_path(self) -> Path:
        return self.root / "velodyne" / f"{self.name}.bin"

    def points(self) -> NDArray[np.float32]:
        """The LiDAR scan in the velodyne frame, (N, 4)."""
        return read_points(self._points_path)

    def labels(self) -> list[KittiObject]:
        """The labelled objects; none where there is no label file."""
        path = self.root / "label_2" / f"{self.name}.txt"
        return read_labels(path) if path.exists() else []


def open_folder(path: Path) -> Iterator[KittiFrame]:
    """The frames of a KITTI folder, or of the ``training`` or ``testing`` folder in it, by name.

    Raises:
        InvalidRequest: there is no ``image_2`` folder.
    """
    for root in (path, path / "training", path / "testing"):
        pictures = root / "image_2"
        if pictures.is_dir():
            names = sorted({p.stem for p in pictures.iterdir() if p.suffix.lower() in _PICTURES})
            return (KittiFrame(root, name) for name in names)
    raise InvalidRequest(
        f"{path} is no KITTI folder: it has no image_2, nor has training/ or testing/ in it",
        field="path",
    )
