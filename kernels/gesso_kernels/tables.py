"""Launch tables: which tile a kernel uses on which architecture, as data.

``tables/sm_XX.json`` holds, per kernel and shape class, the sizes of one program's tile, its warps
and pipeline stages, and a ``source``: how the numbers were found. An architecture without a file
uses that of the next lower one.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Final, Literal

from gesso_kernels.errors import UnsupportedMode

ShapeClass = Literal["tiny", "small", "medium", "large"]
OLDEST: Final = (8, 0)
ARCHITECTURES: Final = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))

_TINY_TOKENS: Final = 16
_SMALL_TOKENS: Final = 64
# Below this many outputs, tiles of 128x128 leave many of a large GPU's cores idle in the last wave.
_MEDIUM_OUTPUTS: Final = 2048 * 3072


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Part of [M, N] that one program computes, and how.

    Attributes:
        block_m: tokens.
        block_n: rows of the weight.
        block_k: columns per step of the sum.
        warps: warps per program.
        stages: depth of the software pipeline.
        split_k: most programs that share the sum over K of one tile; 1, 2, 4 or 8.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1

    def dividing(self, columns: int) -> "Tile":
        """This tile, with steps of 64 columns where its own do not divide K."""
        return self if columns % self.block_k == 0 else replace(self, block_k=64)

    def filling(self, tokens: int, rows: int, cores: int) -> "Tile":
        """This tile with K split no further than the tiles of [M, N] need to fill the cores."""
        tiles = -(-tokens // self.block_m) * -(-rows // self.block_n)
        split = self.split_k
        while split > 1 and tiles * split >= 2 * cores:
            split //= 2
        return replace(self, split_k=split)

    def constants(self) -> dict[str, int]:
        """The sizes as a kernel's constexprs."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch: `constants`, warps and stages."""
        return self.constants() | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file: tiles by kernel and shape class.

    Attributes:
        source: how the numbers were found.
        tiles: by kernel, by shape class.
    """

    source: str
    tiles: dict[str, dict[ShapeClass, Tile]]

    def to_json(self) -> str:
        """The text of the file."""
        kernels = {
            kernel: {shape: asdict(tile) for shape, tile in classes.items()}
            for kernel, classes in self.tiles.items()
        }
        return json.dumps({"source": self.source, "kernels": kernels}, indent=2) + "\n"


def shape_class(tokens: int, rows: int) -> ShapeClass:
    """The class of an [M, N] product."""
    if tokens <= _SMALL_TOKENS:
        return "tiny" if tokens <= _TINY_TOKENS else "small"
    return "medium" if tokens * rows <= _MEDIUM_OUTPUTS else "large"


@cache
def load_table(arch: tuple[int, int]) -> Table:
    """The table of an architecture, or of the next lower one.

    Raises:
        UnsupportedMode: older than sm_80, which the kernels do not compile for.
    """
    known = [candidate for candidate in ARCHITECTURES if candidate <= arch]
    if not known:
        raise UnsupportedMode(
            f"sm_{arch[0]}{arch[1]} is older than sm_80, which the quantized kernels need; use the "
            "mode dequantized there"
        )
    major, minor = known[-1]
    text = files("gesso_kernels").joinpath("tables", f"sm_{major}{minor}.json").read_text()
    data = json.loads(text)
    tiles = {
        kernel: {shape: Tile(**tile) for shape, tile in classes.items()}
        for kernel, classes in data["kernels"].items()
    }
    return Table(source=data["source"], tiles=tiles)


def lookup_tile(kernel: str, arch: tuple[int, int], tokens: int, rows: int) -> Tile:
    """The tile of a product of [M, K] with [N, K].

    Raises:
        UnsupportedMode: the architecture has no such kernel.
    """
    return _classes(kernel, arch)[shape_class(tokens, rows)]


def tiles_of(kernel: str, arch: tuple[int, int]) -> tuple[Tile, ...]:
    """The different tiles of a kernel on an architecture, in the order of the shape classes."""
    return tuple(dict.fromkeys(_classes(kernel, arch).values()))


def has_kernel(kernel: str, arch: tuple[int, int]) -> bool:
    """Whether the architecture's table lists the kernel."""
    return arch >= OLDEST and kernel in load_table(arch).tiles


def _classes(kernel: str, arch: tuple[int, int]) -> dict[ShapeClass, Tile]:
    tiles = load_table(arch).tiles
    if kernel not in tiles:
        raise UnsupportedMode(
            f"{kernel} does not run on sm_{arch[0]}{arch[1]}; kernels there: "
            f"{', '.join(sorted(tiles))}"
        )
    return tiles[kernel]
