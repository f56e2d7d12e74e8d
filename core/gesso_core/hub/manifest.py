"""`gesso_manifest.json`: the files of a model folder, their sizes and hashes, and their origin."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gesso_core.errors import NumericalError, WeightsError
from gesso_core.hub.checkpoint import MANIFEST, weight_files
from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
from gesso_core.safe_files import inside, read_header, read_json, read_tensors


@dataclass(frozen=True)
class FileReport:
    """What `verify` found out about one file; ``problem`` is None where all is well."""

    name: str
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the file is as it should be."""
        return self.problem is None


def write_manifest(folder: Path, **about: Any) -> Path:
    """Record size and sha256 of every file below ``folder``; ``about`` goes in beside them.

    Usual entries of ``about``: ``model``, ``repo``, ``revision``, ``commit``, ``trained_dtype``.
    """
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in _names(folder)
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": 1, **about, "files": files}, indent=2) + "\n")
    return path


def verify(folder: Path, *, deep: bool = False) -> list[FileReport]:
    """Compare a folder with its manifest, file by file; without a manifest check structure only.

    Args:
        folder: a model or pipeline folder.
        deep: also look at every number, and report tensors with NaN or infinity.

    Raises:
        WeightsError: the folder does not exist, or its manifest cannot be read.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; expected a model folder")
    listed = _listed(folder)
    names = _names(folder) if listed is None else sorted(listed)
    return [_report(folder, name, None if listed is None else listed[name], deep) for name in names]


def _report(folder: Path, name: str, expected: dict[str, Any] | None, deep: bool) -> FileReport:
    try:
        path = inside(folder, name)
        if expected is not None:
            _compare(path, expected)
        if path.suffix == ".safetensors":
            read_header(path)
            if path.name == CANONICAL_FILE:
                read_canonical(path)
            if deep:
                require_finite(path)
    except (WeightsError, NumericalError) as error:
        return FileReport(name, error.message)
    return FileReport(name)


def _compare(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise WeightsError(f"{path} is missing; pull the model again")
    if (size := path.stat().st_size) != expected["size"]:
        raise WeightsError(
            f"{path} has {size} bytes, expected {expected['size']}; pull the model again"
        )
    if (found := sha256(path)) != expected["sha256"]:
        raise WeightsError(
            f"{path} has sha256 {found}, expected {expected['sha256']}; it was changed or damaged, "
            "pull the model again"
        )


def require_finite(path: Path) -> None:
    """Raise `NumericalError` naming the first tensor of a safetensors file with NaN or infinity."""
    for name, tensor in read_tensors(path).items():
        if tensor.is_floating_point() and not _widened(tensor).isfinite().all():
            raise NumericalError(
                f"{name} in {path} has NaN or infinite values: a damaged file, or a training run "
                "that diverged; use another checkpoint"
            )


def _widened(tensor: Tensor) -> Tensor:
    """8-bit floats as fp32: torch cannot look for infinity in them."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def weights_hash(path: Path, variant: str | None = None) -> str:
    """The sha256 that identifies a model's weights.

    One file: its own sha256. Shards: the sha256 over the lines ``<sha256>  <file name>``, sorted by
    name, as ``sha256sum *.safetensors | sha256sum`` prints it.
    """
    files = weight_files(path, variant).files
    if len(files) == 1:
        return sha256(files[0])
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    if not (folder / MANIFEST).exists():
        return None
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise WeightsError(
            f"{folder / MANIFEST} does not list files with 'size' and 'sha256'; pull again"
        )
    return files


def _names(folder: Path) -> list[str]:
    """Relative names of all files, except the manifest and hidden ones."""
    relative = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in relative
        if path.name != MANIFEST and not any(part.startswith(".") for part in path.parts)
    ]
