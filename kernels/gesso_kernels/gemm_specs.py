"""Compile gate entries of the quantized products: every tile that a launch table names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.tables import ARCHITECTURES, Tile, has_kernel, tiles_of

# Arguments that every product has for its epilogue; T is bfloat16.
EPILOGUE_SIGNATURE: Final = {
    "low_rank": "*fp32",
    "up": "*bf16",
    "bias": "*bf16",
    "y": "*bf16",
    "tokens": "i32",
    "rows": "i32",
    "rank": "i32",
}
_FAMILIES: Final = (80, 90, 100, 103, 120)
_EPILOGUE: Final = {"RANK": 32, "HAS_BIAS": True, "ACTIVATION": "silu"}


def specs_of(
    name: str,
    kernel: Any,
    signature: Mapping[str, str],
    instruction: Mapping[int, str],
    **constexprs: object,
) -> list[CompileSpec]:
    """One entry per different tile of kernel ``name``, for the architectures that use it.

    Args:
        name: of the kernel in the tables.
        kernel: the ``@triton.jit`` function.
        signature: its tensors and integers.
        instruction: text in the SASS by architecture (90 for sm_90): the tensor core in use.
        constexprs: beyond the tile and the epilogue.
    """
    specs = [
        CompileSpec(
            name=f"{name}-{_text(tile)}",
            kernel=kernel,
            signature=dict(signature) | ({"y": "*fp32"} if tile.split_k > 1 else {}),
            constexprs=_EPILOGUE | constexprs | tile.constants() | _parts(kernel, tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
            archs=archs,
            expects={arch: text for arch, text in instruction.items() if arch in archs},
        )
        for tile, archs in _users(name).items()
    ]
    return [*specs, _bare(specs[0]), _widest(specs)]


def _bare(spec: CompileSpec) -> CompileSpec:
    """Without branch, bias and activation."""
    return replace(
        spec,
        name=f"{spec.name}-bare",
        constexprs=dict(spec.constexprs) | {"RANK": 0, "HAS_BIAS": False, "ACTIVATION": "none"},
        archs=spec.archs[-1:],
    )


def _widest(specs: list[CompileSpec]) -> CompileSpec:
    """The largest tile with the longest branch, which runs in several steps."""
    largest = max(specs, key=lambda spec: _outputs(spec.constexprs))
    return replace(
        largest, name=f"{largest.name}-r256", constexprs=dict(largest.constexprs) | {"RANK": 256}
    )


def _outputs(constexprs: Mapping[str, Any]) -> int:
    return int(constexprs["BLOCK_M"] * constexprs["BLOCK_N"])


def finish_specs_of(name: str, kernel: Any, signature: Mapping[str, str]) -> list[CompileSpec]:
    """Entries of the kernel that adds the parts of those tiles of ``name`` that split K."""
    specs = [
        CompileSpec(
            name=f"{name}-parts-{_text(tile)}",
            kernel=kernel,
            signature=signature,
            constexprs=_EPILOGUE
            | {"PARTS": tile.split_k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            num_warps=tile.warps,
            num_stages=3,
            archs=archs,
        )
        for tile, archs in _users(name).items()
        if tile.split_k > 1
    ]
    return [*specs, _bare(specs[0])]


def _users(name: str) -> dict[Tile, tuple[int, ...]]:
    """The tiles of kernel ``name`` in all tables, with the architectures that use them.

    Where K is an odd number of groups, a tile takes steps of one group, and where there are tiles
    enough, K is not split: these variants are compiled once per family of architectures.
    """
    users: dict[Tile, dict[int, None]] = {}
    for major, minor in ARCHITECTURES:
        if not has_kernel(name, (major, minor)):
            continue
        arch, table = 10 * major + minor, tiles_of(name, (major, minor))
        variants = [tile.dividing(64) for tile in table]
        variants += [replace(tile, split_k=1) for tile in variants]
        for tile in [*table, *(variants if arch in _FAMILIES else [])]:
            users.setdefault(tile, {})[arch] = None
    return {tile: tuple(archs) for tile, archs in users.items()}


def _parts(kernel: Any, tile: Tile) -> dict[str, int]:
    return {"PARTS": tile.split_k} if "PARTS" in kernel.arg_names else {}


def _text(tile: Tile) -> str:
    split = f"-split{tile.split_k}" if tile.split_k > 1 else ""
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sizes}-{tile.warps}warps-{tile.stages}stages{split}"
