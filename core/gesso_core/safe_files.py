"""Opening files that a stranger may have written: names stay in their folder, pickles stay shut.

And writing tensors, so that nobody ever opens half a file. Torch comes in with the first tensor:
who only asks for a name does without it.
"""

import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from safetensors import SafetensorError, safe_open

from gesso_core.errors import UnsafeFile, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES: Final = 100_000_000
PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_SUFFIXES: Final = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_WRONG_TYPES: Final = (TypeError, AttributeError, RecursionError)
POINTER_START: Final = b"version https://git-lfs"


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refusing every name that leads out of the folder.

    Raises:
        UnsafeFile: an absolute name, ``..``, a NUL or a backslash, or a symbolic link that leaves.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise UnsafeFile(
            f"{name[:200]!r} is not a file name inside {folder}; "
            "names must be relative and must not contain '..'"
        )
    path = folder / pure
    if not path.resolve().is_relative_to(_allowed_root(folder)):
        raise UnsafeFile(
            f"{path} is a link to {path.resolve()}, outside its folder; replace it with the file"
        )
    return path


def _allowed_root(folder: Path) -> Path:
    """The folder; in the cache of huggingface_hub, whose snapshots are links, the repository's."""
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path.name} is missing in {path.parent}; expected a folder in the diffusers layout"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: per tensor dtype, shape and offsets, and ``__metadata__``.

    Raises:
        UnsafeFile: the bytes are a pickle, whatever the name says.
        WeightsError: the file is missing, truncated, or something else altogether.
    """
    try:
        with path.open("rb") as file:
            return _header(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} is missing; pull the model again, or check the folder"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def header_of(path: Path, data: bytes) -> dict[str, Any]:
    """`read_header` of bytes that were read from ``path``, whatever has become of the file."""
    return _header(path, io.BytesIO(data), len(data))


def _header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    prefix = file.read(32)
    _refuse_other_kinds(path, prefix)
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise WeightsError(_broken(path, f"a header of {length} bytes in {size} bytes"))
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        _require_texts(header.get("__metadata__", {}))
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        end = max((int(v["data_offsets"][1]) for v in tensors.values()), default=0)
    except (ArithmeticError, LookupError, ValueError, *_WRONG_TYPES) as error:
        raise WeightsError(_broken(path, f"no readable header ({error})")) from error
    if size != 8 + length + end:
        raise WeightsError(_broken(path, f"{size} bytes instead of {8 + length + end}"))
    return dict(header)


def read_tensors(path: Path, skip: Collection[str] = ()) -> "dict[str, Tensor]":
    """Every tensor of a safetensors file, exactly as stored; raises like `read_header`.

    Those named in ``skip`` are not even read.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            names = [name for name in opened.keys() if name not in skip]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(_broken(path, str(error))) from error


def _require_texts(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TypeError("__metadata__ must hold texts by name")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either whole or not there, and its folder if need be."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    readable = partial.stat().st_mode  # as the user has it; `save_file` makes it private
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.chmod(readable)
    partial.replace(path)


def _refuse_other_kinds(path: Path, prefix: bytes) -> None:
    # The length of a header may begin with the same bytes; but then its JSON comes after it.
    is_pickle = prefix.startswith(PICKLE_STARTS) and prefix[8:9] != b"{"
    if is_pickle or path.suffix in PICKLE_SUFFIXES:
        raise UnsafeFile(
            f"{path} is a pickle, which can run code when opened; gesso reads safetensors only. "
            f"Convert it once: gesso models convert {path.name} {path.stem}.safetensors"
        )
    if prefix.startswith(POINTER_START):
        raise WeightsError(f"{path} is a git-lfs pointer, not the weights; fetch it: git lfs pull")


def _broken(path: Path, what: str) -> str:
    return f"{path} is not a complete safetensors file: {what}; download it again"
