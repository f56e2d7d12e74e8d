"""Surfaces of distance grids, and the two files they are written to.

Vertices are metres in the object's frame or, once posed, in the rectified camera frame (x right,
y down, z forward). GLB wants y up: `glb_bytes` turns the frame, `ply_bytes` keeps it.
"""

# V vertices   F faces

import json
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from gesso_core.annotate.slf.sdf import Grid, Pose, camera_from_object
from gesso_core.errors import InvalidRequest

_GLB_MAGIC, _GLB_VERSION = 0x46546C67, 2
_JSON_CHUNK, _BINARY_CHUNK = 0x4E4F534A, 0x004E4942
_FLOAT, _UNSIGNED = 5126, 5125
_VERTICES, _INDICES = 34962, 34963  # what a buffer view is for
_TRIANGLES: Final = 4


@dataclass(frozen=True)
class Mesh:
    """A closed triangle surface; faces turn counter-clockwise seen from outside."""

    vertices_V3: NDArray[np.float32]
    faces_F3: NDArray[np.uint32]

    def posed(self, pose: Pose) -> "Mesh":
        """The mesh in the camera frame; a pose of one row."""
        points = torch.from_numpy(self.vertices_V3)[None]
        return Mesh(camera_from_object(points, pose)[0].numpy(), self.faces_F3)


def mesh_of(grid: Grid) -> Mesh:
    """The zero surface of one shape, in its own frame; empty where nothing is inside."""
    values = grid.values.detach().reshape(grid.size).numpy()
    origin = grid.origin_3.float().numpy().copy()
    if grid.mirrored:  # the plane z = 0 is shared by both halves
        values = np.concatenate([values[..., :0:-1], values], axis=2)
        origin[2] -= grid.voxel * (grid.size[2] - 1)
    # A border of outside closes shapes that reach the edge of their grid.
    values = np.pad(values, 1, constant_values=grid.voxel)
    if not (values < 0).any():
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint32))
    vertices, faces, _, _ = marching_cubes(values, 0.0, spacing=(grid.voxel,) * 3)
    return Mesh((vertices + origin - grid.voxel).astype(np.float32), faces.astype(np.uint32))


def volume(mesh: Mesh) -> float:
    """Cubic metres inside a closed mesh; negative where its faces turn the wrong way."""
    a, b, c = (mesh.vertices_V3[mesh.faces_F3[:, i]].astype(np.float64) for i in range(3))
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


def ply_bytes(mesh: Mesh) -> bytes:
    """A binary little-endian PLY file."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(mesh.vertices_V3)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces_F3)}\n"
        "property list uchar uint vertex_indices\nend_header\n"
    )
    rows = np.zeros(len(mesh.faces_F3), dtype=[("count", "u1"), ("corners", "<u4", 3)])
    rows["count"], rows["corners"] = 3, mesh.faces_F3
    return header.encode("ascii") + mesh.vertices_V3.astype("<f4").tobytes() + rows.tobytes()


def glb_bytes(mesh: Mesh) -> bytes:
    """A binary glTF 2.0 file of one mesh; y points up, so the file shows z towards the viewer."""
    if not len(mesh.vertices_V3):
        raise InvalidRequest("an empty shape cannot be written as glTF", field="mesh")
    turned = mesh.vertices_V3 * np.array([1, -1, -1], np.float32)  # half a turn about x
    vertices = turned.astype("<f4").tobytes()
    faces = mesh.faces_F3.astype("<u4").tobytes()
    description = {
        "asset": {"version": "2.0", "generator": "gesso"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [
            {"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "mode": _TRIANGLES}]}
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": _FLOAT,
                "count": len(turned),
                "type": "VEC3",
                "min": turned.min(axis=0).tolist(),
                "max": turned.max(axis=0).tolist(),
            },
            {
                "bufferView": 1,
                "componentType": _UNSIGNED,
                "count": mesh.faces_F3.size,
                "type": "SCALAR",
            },
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(vertices), "target": _VERTICES},
            {
                "buffer": 0,
                "byteOffset": len(vertices),
                "byteLength": len(faces),
                "target": _INDICES,
            },
        ],
        "buffers": [{"byteLength": len(vertices) + len(faces)}],
    }
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = vertices + faces  # both are whole numbers of four bytes
    length = 12 + 8 + len(text) + 8 + len(binary)
    return b"".join(
        (
            struct.pack("<III", _GLB_MAGIC, _GLB_VERSION, length),
            struct.pack("<II", len(text), _JSON_CHUNK),
            text,
            struct.pack("<II", len(binary), _BINARY_CHUNK),
            binary,
        )
    )
