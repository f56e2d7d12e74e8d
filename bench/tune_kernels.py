"""Find the best tile of every quantized product on this GPU and write the launch table.

    python bench/tune_kernels.py [--kernel gemm_w8a8_int8]
    python bench/tune_kernels.py --smoke       a few tiles in the interpreter; measures nothing

The tables in kernels/gesso_kernels/tables are what serving reads; nothing is tuned while it runs.
Candidates that do not fit the shared memory or fail to compile are passed over and named.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gesso_core.quant.modules import SVDQuantLinear
from gesso_kernels import gemm_nvfp4, gemm_w4a4, gemm_w4a8, gemm_w4a16, gemm_w8a8, tables
from gesso_kernels.modes import Mode, possible_modes
from gesso_kernels.quant_down import InputFormat, quant_down
from gesso_kernels.tables import ShapeClass, Tile
from gpu_timing import Bench, bench_of
from svdquant_gpu import LAYERS, SMOKE_LAYERS, layer, outlier_rows
from torch import Tensor
from triton.runtime.errors import TritonError

TABLES = Path(tables.__file__).parent / "tables"
# The number of tokens that stands for each class of shapes.
TOKENS: dict[ShapeClass, int] = {"tiny": 8, "small": 64, "medium": 2048, "large": 8192}
SMOKE_TOKENS: dict[ShapeClass, int] = {"tiny": 8}
# Kernel → the mode that uses it, and the weight format whose file it runs.
KERNELS: dict[str, tuple[Mode, str]] = {
    "gemm_w8a8_int8": ("w8a8_int8", "int8"),
    "gemm_w8a8_fp8": ("w8a8_fp8", "nvfp4"),
    "gemm_w4a8": ("w4a8_prog", "int4"),
    "gemm_w4a4": ("w4a4_i8dot", "int4"),
    "gemm_w4a16": ("w4a16", "int4"),
    "gemm_w4a16_nvfp4": ("w4a16", "nvfp4"),
    "gemm_nvfp4": ("nvfp4", "nvfp4"),
}
Run = Callable[[Tile], Tensor]


def candidates(kernel: str, shape: ShapeClass, smoke: bool) -> Iterator[Tile]:
    """Tiles worth trying; steps of 64 where the kernel rescales or unpacks by groups of 64."""
    if smoke:
        yield Tile(block_m=16, block_n=32, block_k=64, warps=4, stages=1)
        return
    few = shape in ("tiny", "small")
    rows = (16, 32, 64) if few else (64, 128)
    steps = (64, 128) if kernel.startswith("gemm_w8a8") or kernel == "gemm_nvfp4" else (64,)
    splits = (1, 2, 4, 8) if kernel.startswith("gemm_w4a16") and few else (1,)
    choices = itertools.product(rows, (64, 128, 256), steps, (4, 8), (3, 4, 5), splits)
    for block_m, block_n, block_k, warps, stages, split_k in choices:
        if block_m * block_n > 128 * 256 or (block_m * block_n >= 128 * 128 and warps < 8):
            continue  # such tiles spill
        yield Tile(
            block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages,
            split_k=split_k,
        )  # fmt: skip


def runs_of(kernel: str, x: Tensor, shape: tuple[int, int], bench: Bench) -> Run:
    """The product alone, on quantized inputs, with a tile to be given."""
    mode, weight = KERNELS[kernel]
    record = layer(shape, weight)[1]
    dtype = torch.float16 if bench.smoke else bench.dtype  # the interpreter needs fp16
    m = SVDQuantLinear.from_record(record, mode, device=bench.device, dtype=dtype)
    x = x.to(dtype)
    out = {"activation": "none", "out_dtype": dtype}
    if mode == "w4a16":
        alpha = m.alpha if weight == "nvfp4" else None
        given = (x, m.smooth, m.weight4, m.weight_scale, alpha, m.down, m.up, None)
        return lambda tile: gemm_w4a16.gemm_w4a16_triton(*given, tile=tile)
    formats: dict[Mode, InputFormat] = {
        "w8a8_int8": "int8", "w8a8_fp8": "fp8", "w4a8_prog": "int8", "w4a4_i8dot": "int4",
        "nvfp4": "nvfp4",
    }  # fmt: skip
    codes, scale, low_rank = quant_down(x, m.smooth, m.down, format=formats[mode])
    end = (low_rank, m.up, None)
    if mode in ("w8a8_int8", "w8a8_fp8"):
        return lambda tile: gemm_w8a8.gemm_w8a8_triton(
            codes, scale, m.weight, m.row_scale, *end, **out, tile=tile
        )
    if mode == "w4a8_prog":
        return lambda tile: gemm_w4a8.gemm_w4a8_triton(
            codes, scale, m.weight4, m.multipliers, m.row_scale, *end, **out, tile=tile
        )
    if mode == "w4a4_i8dot":
        return lambda tile: gemm_w4a4.gemm_w4a4_triton(
            codes, scale, m.weight4, m.weight_scale, *end, **out, unsigned=False, tile=tile
        )
    return lambda tile: gemm_nvfp4.gemm_nvfp4_triton(
        codes, scale, m.weight4, m.weight_scale, m.alpha, *end, **out, tile=tile
    )


def best_tile(kernel: str, shape_class: ShapeClass, tokens: int, bench: Bench) -> Tile | None:
    """The tile with the smallest sum of times over the layers of Sana-1.6B."""
    times: dict[Tile, float] = {}
    for shape in (SMOKE_LAYERS if bench.smoke else LAYERS).values():
        run = runs_of(kernel, outlier_rows(tokens, shape[1], 2).to(bench.device), shape, bench)
        for tile in candidates(kernel, shape_class, bench.smoke):
            try:
                run(tile)
                times[tile] = times.get(tile, 0.0) + bench.microseconds(partial(run, tile))
            except (RuntimeError, ValueError, TritonError) as why:
                print(f"{kernel} {tile}: {str(why).splitlines()[0]}")
                times[tile] = float("inf")
    fitting = {tile: time for tile, time in times.items() if time < float("inf")}
    return min(fitting, key=lambda tile: fitting[tile]) if fitting else None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--smoke", action="store_true", help="in the interpreter; not a result")
    arguments = parser.parse_args()
    bench = bench_of(arguments.smoke)
    arch = (9, 0) if bench.smoke else torch.cuda.get_device_capability()
    table = tables.load_table(arch)
    tiles = {kernel: dict(classes) for kernel, classes in table.tiles.items()}
    for kernel in arguments.kernel or KERNELS:
        mode, weight = KERNELS[kernel]
        if kernel not in tiles or mode not in possible_modes(weight, arch):
            continue
        for shape_class, tokens in (SMOKE_TOKENS if bench.smoke else TOKENS).items():
            tile = best_tile(kernel, shape_class, tokens, bench)
            print(kernel, shape_class, tile, flush=True)
            if tile is not None:
                tiles[kernel][shape_class] = tile
    about = bench.about()
    source = f"timed on {about['device']}, torch {about['torch']}, {about['date']}"
    if not bench.smoke:
        path = TABLES / f"sm_{arch[0]}{arch[1]}.json"
        path.write_text(replace(table, source=source, tiles=tiles).to_json())
        print(f"written: {path}")


if __name__ == "__main__":
    main()
