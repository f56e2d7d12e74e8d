"""Find the best tile of every quantized product on this GPU and write the launch table.

    python bench/tune_kernels.py [--kernel gemm_w8a8_int8] [--jobs 14]
    python bench/tune_kernels.py --smoke       a few tiles in the interpreter; measures nothing

The tables in kernels/gesso_kernels/tables are what serving reads; nothing is tuned while it runs.
Candidates are compiled first, by ``--jobs`` processes that share Triton's cache; those that do not
fit the shared memory or fail to compile are passed over. All are timed at the first layer of their
class, the best of them at the others.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

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
# Tokens that stand for the classes: a text, and guided pictures of Sana-1.6B at 1024 and 2048 px.
TOKENS, SMOKE_TOKENS = (8, 64, 2048, 8192), (8,)
KEPT = 6  # candidates of a class that are timed at more than one layer
REPEAT_MS = 20
STRIDE = 8  # pieces of a kernel's candidates that are compiled side by side
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
    few, weight_only = shape in ("tiny", "small"), kernel.startswith("gemm_w4a16")
    rows = (16, 32, 64) if few else (64, 128)
    steps = (64, 128) if kernel.startswith("gemm_w8a8") or kernel == "gemm_nvfp4" else (64,)
    splits = (1, 2, 4, 8) if weight_only and few else (1,)
    stages = (3, 5) if weight_only and few else (3, 4, 5)
    choices = itertools.product(rows, (64, 128, 256), steps, (4, 8), stages, splits)
    for block_m, block_n, block_k, warps, depth, split_k in choices:
        if block_m * block_n > 128 * 256 or (block_m * block_n >= 128 * 128 and warps < 8):
            continue  # such tiles spill
        yield Tile(
            block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=depth,
            split_k=split_k,
        )  # fmt: skip


def cases(shape: ShapeClass, smoke: bool) -> list[tuple[tuple[int, int], int]]:
    """Layers of Sana-1.6B and tokens whose products are of this class."""
    shapes = (SMOKE_LAYERS if smoke else LAYERS).values()
    return [
        (layer_shape, tokens)
        for tokens in (SMOKE_TOKENS if smoke else TOKENS)
        for layer_shape in shapes
        if tables.shape_class(tokens, layer_shape[0]) == shape
    ]


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


def compile_tiles(kernel: str, tiles: list[Tile]) -> None:
    """Run tiles once, each, so that Triton's cache has them; what fails here fails again later."""
    torch.set_num_threads(1)
    bench = bench_of(smoke=False)
    with torch.inference_mode():
        small = LAYERS["out"]  # the code does not depend on the layer
        run = runs_of(kernel, outlier_rows(64, small[1], 2).to(bench.device), small, bench)
        for tile in tiles:
            with suppress(RuntimeError, ValueError, TritonError):
                run(tile)
        torch.cuda.synchronize()


def compile_all(work: list[tuple[str, ShapeClass]], jobs: int) -> None:
    """Every candidate of every kernel; strided, as neighbours take equally long."""
    tiles: dict[str, dict[Tile, None]] = {}
    for kernel, shape in work:
        tiles.setdefault(kernel, {}).update(dict.fromkeys(candidates(kernel, shape, smoke=False)))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = [
            pool.submit(compile_tiles, kernel, list(of_kernel)[start::STRIDE])
            for kernel, of_kernel in tiles.items()
            for start in range(STRIDE)
        ]
        for future in futures:
            future.result()


def best_tile(kernel: str, shape: ShapeClass, bench: Bench) -> Tile | None:
    """The tile with the smallest sum of times over the layers of its class."""
    times = dict.fromkeys(candidates(kernel, shape, bench.smoke), 0.0)
    for layer_shape, tokens in cases(shape, bench.smoke):
        x = outlier_rows(tokens, layer_shape[1], 2).to(bench.device)
        run = runs_of(kernel, x, layer_shape, bench)
        for tile in list(times):
            try:
                run(tile)
                times[tile] += bench.microseconds(partial(run, tile), REPEAT_MS)
            except (RuntimeError, ValueError, TritonError) as why:
                print(f"{kernel} {tile}: {str(why).splitlines()[0]}")
                del times[tile]
        times = dict(sorted(times.items(), key=lambda item: item[1])[:KEPT])
    return next(iter(times), None)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--smoke", action="store_true", help="in the interpreter; not a result")
    arguments = parser.parse_args()
    bench = bench_of(arguments.smoke)
    arch = (9, 0) if bench.smoke else torch.cuda.get_device_capability()
    table = tables.load_table(arch)
    tiles = {kernel: dict(classes) for kernel, classes in table.tiles.items()}
    classes: tuple[ShapeClass, ...] = get_args(ShapeClass)
    work = [
        (kernel, shape)
        for kernel in arguments.kernel or KERNELS
        if kernel in tiles and KERNELS[kernel][0] in possible_modes(KERNELS[kernel][1], arch)
        for shape in classes
        if cases(shape, bench.smoke)
    ]
    if arguments.jobs > 1 and not bench.smoke:
        compile_all(work, arguments.jobs)
    for kernel, shape in work:
        tile = best_tile(kernel, shape, bench)
        print(kernel, shape, tile, flush=True)
        if tile is not None:
            tiles[kernel][shape] = tile
    about = bench.about()
    source = f"timed on {about['device']}, torch {about['torch']}, {about['date']}"
    if not bench.smoke:
        path = TABLES / f"sm_{arch[0]}{arch[1]}.json"
        path.write_text(replace(table, source=source, tiles=tiles).to_json())
        print(f"written: {path}")


if __name__ == "__main__":
    main()
