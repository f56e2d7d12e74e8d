"""A folder of LoRA files, by name; what changes on disk is picked up at the next request.

A file ``ink.safetensors`` is the LoRA ``ink``. Files are read at first use and kept as long as
there is room. A look at size and times says whether a file may have changed, its hash whether it
has. Work that has begun keeps the factors it began with.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, Generic, Protocol, TypeVar

import torch

from gesso_core.errors import InvalidRequest, UnsafeFile, WeightsError
from gesso_core.lora.adapter import Adapter, read_adapter
from gesso_core.lora.stack import AppliedLora, LoraStack, make_stack, stack_key
from gesso_core.lora.targets import LayerMap
from gesso_core.safe_files import inside

NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
ENDING: Final = ".safetensors"
SHOWN: Final = 40  # names in a message
CACHE_BYTES: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """A LoRA asked for: its name in the library, and the factor on its effect."""

    name: str
    strength: float = 1.0


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=_Sized)


class _Recent(Generic[V]):
    """The values used last that fit into a number of bytes; always at least one."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > 1 and self._bytes() > self.most_bytes:
            self._values.popitem(last=False)
        return self._values[key]

    def _bytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())


class LoraLibrary:
    """The LoRAs of a folder for one model. May be used from several threads."""

    def __init__(self, folder: Path, layers: LayerMap, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self.layers = layers
        self._files: _Recent[Adapter] = _Recent(cache_bytes)
        self._stacks: _Recent[LoraStack] = _Recent(cache_bytes)
        self._lock = Lock()

    def names(self) -> list[str]:
        """What there is now. Files whose names are not plain words are left out."""
        if not self.folder.is_dir():
            return []
        stems = (path.stem for path in self.folder.glob(f"*{ENDING}") if path.is_file())
        return sorted(stem for stem in stems if NAME.fullmatch(stem))

    def require(self, uses: Sequence[LoraUse]) -> None:
        """`InvalidRequest` for a name that is not in the folder, `UnsafeFile` for a link."""
        for use in uses:
            self._path(use.name)

    def stack(
        self, uses: Sequence[LoraUse], *, dtype: torch.dtype, device: torch.device
    ) -> LoraStack:
        """The adapters as they are on disk now, ready for the model.

        Raises:
            InvalidRequest: a name that is not in the folder.
            WeightsError: a file that is broken, or does not fit the model.
        """
        with self._lock:
            try:
                return self._stack(uses, dtype, device)
            except WeightsError as error:
                # Whoever asks need not know where on the server the folder is.
                message = error.message.replace(f"{self.folder}/", "")
                raise type(error)(message, field="loras") from error

    def _stack(
        self, uses: Sequence[LoraUse], dtype: torch.dtype, device: torch.device
    ) -> LoraStack:
        read = [self._read(use.name) for use in uses]
        applied = [
            AppliedLora(name=use.name, sha256=adapter.sha256, strength=use.strength)
            for use, adapter in zip(uses, read, strict=True)
        ]
        wanted = list(zip(applied, read, strict=True))
        made = self._stacks.get(
            (tuple(applied), dtype, device),
            lambda: make_stack(wanted, self.layers, dtype=dtype, device=device),
        )
        assert made.key == stack_key(applied)
        return made

    def _read(self, name: str) -> Adapter:
        path = self._path(name)
        try:
            at = path.stat()
        except OSError as error:
            raise WeightsError(f"cannot read the LoRA {name!r}: {error.strerror}") from error
        state = (name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino)
        return self._files.get(state, lambda: read_adapter(path))

    def _path(self, name: str) -> Path:
        if NAME.fullmatch(name):
            path = self._inside(name + ENDING)
            if path.is_file():
                return path
        raise InvalidRequest(
            f"there is no LoRA {name[:80]!r}; {_listed(self.names())}", field="loras"
        )

    def _inside(self, file: str) -> Path:
        try:
            return inside(self.folder, file)
        except UnsafeFile as error:
            raise UnsafeFile(
                f"{file} is a link to outside its folder; replace it with the file", field="loras"
            ) from error


def _listed(names: Sequence[str]) -> str:
    if not names:
        return (
            "the LoRA folder holds none; put files there that are named like ink.safetensors, in "
            "lower-case letters, digits and dashes"
        )
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"available: {', '.join(names[:SHOWN])}{more}"
