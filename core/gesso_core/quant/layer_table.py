"""The error of one synthetic layer under every combination of SVDQuant's parts.

    python -m gesso_core.quant.layer_table [--seeds 0 1 2] [--out table.json] [--svd exact]

Each cell is the relative Frobenius error of the output on test tokens, the geometric mean over the
seeds, beside the value expected of a correct implementation and the ratio of the two. λ comes from
39 candidates on 512 tokens, from 19 where the branch takes part. Rows that change only the
activations reuse the layer that was calibrated with 4-bit ones.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Final, Literal

import torch
from torch import Tensor

from gesso_core.quant.layer_calibration import (
    CalibratedLinear,
    Objective,
    Quantizers,
    find_branch,
    find_smooth,
    round_residual,
)
from gesso_core.quant.low_rank import Branch, Svd
from gesso_core.quant.options import QuantOptions
from gesso_core.quant.quantizers import InputFormat, fake_quantize_input, fake_quantize_weight
from gesso_core.quant.synthetic import SyntheticLayer, synthetic_layer

FourBit = Literal["int4", "nvfp4"]
FORMATS: Final[tuple[FourBit, ...]] = ("int4", "nvfp4")
RANKS: Final = (16, 32, 64)
SEARCH_TOKENS: Final = 512

# Row to (INT4, NVFP4).
EXPECTED: Final[dict[str, tuple[float, float]]] = {
    "naive W4A4": (0.287, 0.152),
    "naive W4A16": (0.180, 0.114),
    "naive W16A4": (0.224, 0.102),
    "naive + GPTQ": (0.252, 0.122),
    "SVD only r16": (0.240, 0.114),
    "SVD only r32": (0.231, 0.110),
    "SVD only r64": (0.215, 0.103),
    "smooth only": (0.108, 0.083),
    "smooth + GPTQ": (0.091, 0.070),
    "smooth + SVD r16": (0.069, 0.053),
    "smooth + SVD r32": (0.063, 0.050),
    "smooth + SVD r64": (0.055, 0.044),
    "iterated r16": (0.065, 0.051),
    "iterated r32": (0.058, 0.046),
    "iterated r64": (0.049, 0.039),
    "iterated + GPTQ r16": (0.056, 0.044),
    "iterated + GPTQ r32": (0.051, 0.040),
    "iterated + GPTQ r64": (0.043, 0.035),
    "iterated r32, 16-bit activations": (0.0383, 0.0285),
    "iterated r32, int8 activations": (0.0384, 0.0287),
    "iterated r32, fp8 activations": (0.0395, 0.0302),
    "iterated + GPTQ r32, 16-bit activations": (0.0254, 0.0187),
    "iterated + GPTQ r32, int8 activations": (0.0257, 0.0191),
    "plain W8A8 int8": (0.079, 0.079),
    "plain W8A8 fp8": (0.032, 0.032),
    "bf16": (0.003, 0.003),
}

Forward = Callable[[Tensor], Tensor]
Row = tuple[str, Forward]


@dataclass(frozen=True, eq=False)
class _Bench:
    """A layer, a 4-bit format, and what judges candidates."""

    layer: SyntheticLayer
    options: QuantOptions
    objective: Objective
    generator: torch.Generator

    @classmethod
    def of(cls, layer: SyntheticLayer, four: FourBit, svd: Svd) -> "_Bench":
        x_MK = layer.calibration_MK
        objective = Objective(layer.weight_NK, None, x_MK, torch.arange(SEARCH_TOKENS), None)
        options = QuantOptions(four, four, svd=svd)
        return cls(layer, options, objective, torch.Generator().manual_seed(0))

    def round(self, smooth_K: Tensor, branch: Branch, *, gptq: bool = False) -> CalibratedLinear:
        return round_residual(
            self.layer.weight_NK,
            self.layer.calibration_MK,
            replace(self.options, gptq=gptq),
            smooth_K=smooth_K,
            branch=branch,
        )

    def smooth(self, rank: int) -> Tensor:
        options = replace(self.options, rank=rank, grids=10 if rank else 20)
        x_MK, weight_NK = self.layer.calibration_MK, self.layer.weight_NK
        quantizers = Quantizers.of(options, self.generator)
        return find_smooth(weight_NK, x_MK, options, self.objective, quantizers)[0]

    def branch(self, smooth_K: Tensor, rank: int, *, iterations: int = 1) -> Branch:
        options = replace(self.options, rank=rank, iterations=iterations)
        quantizers = Quantizers.of(options, self.generator)
        weight_NK = self.layer.weight_NK
        return find_branch(weight_NK, smooth_K, options, self.objective, quantizers)[0]


def _rows(bench: _Bench) -> Iterator[Row]:
    ones_K = torch.ones(bench.layer.weight_NK.shape[1])
    nothing = bench.branch(ones_K, 0)
    yield from _naive_rows(bench, ones_K, nothing)
    smooth_K = bench.smooth(0)
    yield "smooth only", bench.round(smooth_K, nothing)
    yield "smooth + GPTQ", bench.round(smooth_K, nothing, gptq=True)
    for rank in RANKS:
        yield f"SVD only r{rank}", bench.round(ones_K, bench.branch(ones_K, rank))
        yield from _branch_rows(bench, rank)
    yield from _eight_bit_rows(bench.layer.weight_NK)


def _naive_rows(bench: _Bench, ones_K: Tensor, nothing: Branch) -> Iterator[Row]:
    naive = bench.round(ones_K, nothing)
    weight_NK, four = bench.layer.weight_NK, bench.options.activation
    yield "naive W4A4", naive
    yield "naive W4A16", replace(naive, activation="16bit")
    yield "naive W16A4", lambda x_MK: fake_quantize_input(x_MK, four) @ weight_NK.mT
    yield "naive + GPTQ", bench.round(ones_K, nothing, gptq=True)


def _branch_rows(bench: _Bench, rank: int) -> Iterator[Row]:
    smooth_K = bench.smooth(rank)
    yield f"smooth + SVD r{rank}", bench.round(smooth_K, bench.branch(smooth_K, rank))
    branch = bench.branch(smooth_K, rank, iterations=100)
    iterated = bench.round(smooth_K, branch)
    compensated = bench.round(smooth_K, branch, gptq=True)
    yield f"iterated r{rank}", iterated
    yield f"iterated + GPTQ r{rank}", compensated
    if rank != 32:
        return
    formats: dict[str, InputFormat] = {"16-bit": "16bit", "int8": "int8", "fp8": "fp8"}
    for name, activation in formats.items():
        yield f"iterated r32, {name} activations", replace(iterated, activation=activation)
        if name != "fp8":
            label = f"iterated + GPTQ r32, {name} activations"
            yield label, replace(compensated, activation=activation)


def _eight_bit_rows(weight_NK: Tensor) -> Iterator[Row]:
    int8_NK = fake_quantize_weight(weight_NK, "int8", torch.bfloat16)
    fp8_NK = fake_quantize_input(weight_NK, "fp8")
    half_NK = weight_NK.bfloat16()
    yield "plain W8A8 int8", lambda x_MK: fake_quantize_input(x_MK, "int8") @ int8_NK.mT
    yield "plain W8A8 fp8", lambda x_MK: fake_quantize_input(x_MK, "fp8") @ fp8_NK.mT
    yield "bf16", lambda x_MK: (x_MK.bfloat16() @ half_NK.mT).float()


def layer_errors(
    layer: SyntheticLayer, four: FourBit, *, svd: Svd = "randomized"
) -> dict[str, float]:
    """The error of every row of the table for one layer, by its label in `EXPECTED`."""
    exact_MN = layer.test_MK.double() @ layer.weight_NK.double().mT
    return {
        label: float((forward(layer.test_MK) - exact_MN).norm() / exact_MN.norm())
        for label, forward in _rows(_Bench.of(layer, four, svd))
    }


def error_table(seeds: Sequence[int], *, svd: Svd = "randomized") -> dict[str, dict[str, Any]]:
    """Row to format to ``error``, ``expected``, ``ratio`` and ``by_seed``."""
    layers = [synthetic_layer(seed) for seed in seeds]
    table: dict[str, dict[str, Any]] = {label: {} for label in EXPECTED}
    for index, four in enumerate(FORMATS):
        found = [layer_errors(layer, four, svd=svd) for layer in layers]
        for label, expected in EXPECTED.items():
            by_seed = [errors[label] for errors in found]
            error = geometric_mean(by_seed)
            table[label][four] = {
                "error": error,
                "expected": expected[index],
                "ratio": error / expected[index],
                "by_seed": by_seed,
            }
    return table


def _print(table: dict[str, dict[str, Any]]) -> None:
    print(f"{'':40}" + "".join(f"{four.upper():>10} expected  ratio" for four in FORMATS))
    for label, cells in table.items():
        columns = (
            f"{c['error']:10.4f} {c['expected']:8.4f} {c['ratio']:6.2f}" for c in cells.values()
        )
        print(f"{label:40}" + "".join(columns))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--svd", choices=("randomized", "exact"), default="randomized")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    table = error_table(args.seeds, svd=args.svd)
    seconds = time.perf_counter() - started
    _print(table)
    print(f"{seconds:.0f} s")
    if args.out:
        result = {"seeds": args.seeds, "svd": args.svd, "seconds": round(seconds), "rows": table}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
