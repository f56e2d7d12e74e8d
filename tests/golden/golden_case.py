"""One golden case: a folder with ``case.json`` and ``tensors.safetensors``."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """What the original implementation was given, and what it answered."""

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    state: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def key(self) -> tuple[str, str]:
        """(system, kind): which adapter replays this case."""
        return self.meta["system"], self.meta["kind"]

    def sibling(self, name: str) -> "Case":
        """Another case of the same system, for cases that share weights."""
        return load_case(self.folder.parent / name)


Adapter = Callable[[Case], dict[str, Tensor]]


def load_case(folder: Path) -> Case:
    """Read a case; tensors are grouped by the prefix of their name."""
    groups: dict[str, dict[str, Tensor]] = {"input": {}, "state": {}, "output": {}}
    tensors = folder / "tensors.safetensors"
    for name, tensor in (load_file(tensors) if tensors.exists() else {}).items():
        prefix, _, rest = name.partition(".")
        groups[prefix][rest] = tensor
    meta = json.loads((folder / "case.json").read_text())
    return Case(folder, meta, groups["input"], groups["state"], groups["output"])


def case_folders(root: Path) -> Iterator[Path]:
    """Every case folder below ``root``: ``<system>/<case>/case.json``."""
    for path in sorted(root.glob("*/*/case.json")):
        if "kind" in json.loads(path.read_text()):
            yield path.parent
