"""From a linear and samples of its input to λ, the branch and the rounded residual.

Everything happens on the shifted input X = x + δ, which turns the bias into bias′ and leaves the
rest of the mathematics as it is without a shift. λ and the factors are rounded to 16 bit *before*
the residual is taken, so that the residual makes up for their rounding.
"""

# M tokens   N out channels   K in channels, padded   R rank

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gesso_core.errors import NumericalError
from gesso_core.quant.gptq import gptq_levels, hessian
from gesso_core.quant.low_rank import Branch, Decompose, iterate_branch, low_rank_branch
from gesso_core.quant.options import QuantOptions
from gesso_core.quant.quantizers import (
    InputFormat,
    WeightGrid,
    fake_quantize_input,
    fake_quantize_weight,
)
from gesso_core.quant.smoothing import (
    Exponents,
    exponent_pairs,
    quantized_output,
    search_smooth,
    smooth_scale,
    span,
)

# (outputs [m, N] with bias, which rows of the samples they are [m]) to whatever should be kept.
Evaluate = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """Squared error of the evaluation module on some rows; without one, of the linear itself."""

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x_MK: Tensor,
        rows_M: Tensor,
        evaluate: Evaluate | None,
    ) -> None:
        self.bias_N = bias_N
        self.rows_M = rows_M
        self.evaluate = evaluate
        self.x_MK = x_MK[rows_M]
        self.target = self._evaluated(self.x_MK @ weight_NK.mT)

    def __call__(self, y_MN: Tensor) -> float:
        """Of outputs without bias."""
        difference = self._evaluated(y_MN) - self.target
        return float(difference.square().sum(dtype=torch.float64))

    def _evaluated(self, y_MN: Tensor) -> Tensor:
        if self.evaluate is None:
            return y_MN
        return self.evaluate(y_MN if self.bias_N is None else y_MN + self.bias_N, self.rows_M)


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedLinear:
    """The layer as calibration sees it: the values that will be stored, in fp32.

    Attributes:
        activation: number format of the input.
        smooth_K: λ.
        branch: factors; ``down`` acts on the smoothed input.
        grid: scales of the residual.
        levels_NK: the rounded residual in units of the grid.
        exponents: α and β of λ.
        iterations: refits of the branch that were tried.
    """

    activation: InputFormat
    smooth_K: Tensor
    branch: Branch
    grid: WeightGrid
    levels_NK: Tensor
    exponents: Exponents
    iterations: int

    def residual(self) -> Tensor:
        """R, quantized and back, fp32 [N, K]."""
        return self.levels_NK * self.grid.step(self.levels_NK.shape[1])

    def __call__(self, x_MK: Tensor) -> Tensor:
        """Output without bias for a shifted and padded input, fp32 [M, N]."""
        smoothed_MK = x_MK / self.smooth_K
        low_rank_MN = (smoothed_MK @ self.branch.down_RK.mT) @ self.branch.up_NR.mT
        quantized_MK = fake_quantize_input(smoothed_MK, self.activation)
        return torch.addmm(low_rank_MN, quantized_MK, self.residual().mT)


@dataclass(frozen=True)
class Quantizers:
    """What trials round and decompose with.

    Attributes:
        weight: a residual, quantized and back.
        input: a smoothed input, quantized and back.
        decompose: a matrix to its branch.
        activation: name of the input's format.
    """

    weight: Callable[[Tensor], Tensor]
    input: Callable[[Tensor], Tensor]
    decompose: Decompose
    activation: InputFormat

    @classmethod
    def of(cls, options: QuantOptions, generator: torch.Generator) -> "Quantizers":
        """Those of the options; the generator serves the randomized SVD."""
        return cls(
            partial(fake_quantize_weight, weight=options.weight, dtype=options.dtype),
            partial(fake_quantize_input, activation=options.activation),
            partial(low_rank_branch, rank=options.rank, svd=options.svd, generator=generator),
            options.activation,
        )


def calibrate_linear(
    weight_NK: Tensor,
    x_MK: Tensor,
    options: QuantOptions,
    objective: Objective,
    generator: torch.Generator,
    *,
    parts: tuple[int, ...] = (),
) -> CalibratedLinear:
    """Search λ, fit the branch, round the residual.

    Args:
        weight_NK: fp32, K padded to whole groups.
        x_MK: fp32 calibration rows, shifted and padded.
        options: the recipe.
        objective: judges candidates and iterations, on rows of its own.
        generator: of the randomized SVD.
        parts: rows of concatenated linears, see `quantize_nvfp4`.
    """
    quantizers = Quantizers.of(options, generator)
    smooth_K, exponents = find_smooth(weight_NK, x_MK, options, objective, quantizers)
    branch, iterations = find_branch(weight_NK, smooth_K, options, objective, quantizers)
    return round_residual(
        weight_NK,
        x_MK,
        options,
        smooth_K=smooth_K,
        branch=branch,
        exponents=exponents,
        iterations=iterations,
        parts=parts,
    )


def find_smooth(
    weight_NK: Tensor,
    x_MK: Tensor,
    options: QuantOptions,
    objective: Objective,
    quantizers: Quantizers,
) -> tuple[Tensor, Exponents]:
    """λ, already rounded to 16 bit, fp32 [K], with its α and β; arguments as `calibrate_linear`."""
    if not options.smooth:
        return torch.ones_like(weight_NK[0]), (0.0, 0.0)
    # A channel that is all zero says nothing about λ; left alone it would turn all of λ into ones.
    x_span_K, w_span_K = (
        torch.where(reach_K > 0, reach_K, 1.0) for reach_K in (span(x_MK), span(weight_NK))
    )

    def scale_of(exponents: Exponents) -> Tensor:
        smooth_K = smooth_scale(x_span_K, w_span_K, exponents).to(options.dtype).float()
        usable = smooth_K.isfinite() & (smooth_K > 0)
        return smooth_K if bool(usable.all()) else torch.ones_like(smooth_K)

    def error_of(smooth_K: Tensor) -> float:
        return objective(
            quantized_output(
                weight_NK,
                objective.x_MK,
                smooth_K,
                decompose=quantizers.decompose,
                quantize_weight=quantizers.weight,
                quantize_input=quantizers.input,
            )
        )

    found = search_smooth(exponent_pairs(options.grids), scale_of, error_of)
    return found.smooth_K, found.exponents


def find_branch(
    weight_NK: Tensor,
    smooth_K: Tensor,
    options: QuantOptions,
    objective: Objective,
    quantizers: Quantizers,
) -> tuple[Branch, int]:
    """The branch of W diag(λ), and how many refits were tried; arguments as `calibrate_linear`."""
    smoothed_NK = weight_NK * smooth_K
    if options.rank == 0 or options.iterations == 1:
        return quantizers.decompose(smoothed_NK), min(options.rank, 1)
    x_MK = objective.x_MK / smooth_K
    quantized_MK = quantizers.input(x_MK)

    def error(branch: Branch, residual_NK: Tensor) -> float:
        low_rank_MN = (x_MK @ branch.down_RK.mT) @ branch.up_NR.mT
        return objective(torch.addmm(low_rank_MN, quantized_MK, residual_NK.mT))

    found = iterate_branch(
        smoothed_NK,
        iterations=options.iterations,
        decompose=quantizers.decompose,
        quantize=quantizers.weight,
        error=error,
    )
    return found.branch, len(found.errors)


def round_residual(
    weight_NK: Tensor,
    x_MK: Tensor,
    options: QuantOptions,
    *,
    smooth_K: Tensor,
    branch: Branch,
    exponents: Exponents = (0.0, 0.0),
    iterations: int = 1,
    parts: tuple[int, ...] = (),
) -> CalibratedLinear:
    """Round the factors to 16 bit, and what they leave of W diag(λ) to the grid."""
    branch = _as_stored(branch, smooth_K, options.dtype)
    residual_NK = weight_NK * smooth_K - branch.product()
    grid = WeightGrid.fit(residual_NK, options.weight, options.dtype, parts)
    return CalibratedLinear(
        activation=options.activation,
        smooth_K=smooth_K,
        branch=branch,
        grid=grid,
        levels_NK=_round(residual_NK, grid, x_MK / smooth_K if options.gptq else None),
        exponents=exponents,
        iterations=iterations,
    )


def _as_stored(branch: Branch, smooth_K: Tensor, dtype: torch.dtype) -> Branch:
    """The factors after 1/λ was folded into ``down`` and both were rounded."""
    folded_RK = (branch.down_RK / smooth_K).to(dtype).float()
    up_NR = branch.up_NR.to(dtype).float()
    if not (folded_RK.isfinite().all() and up_NR.isfinite().all()):
        raise NumericalError(
            f"the low-rank branch does not fit {dtype}: its largest factor is "
            f"{branch.up_NR.abs().max():g}; quantize with dtype=torch.bfloat16"
        )
    return Branch(folded_RK * smooth_K, up_NR)


def _round(residual_NK: Tensor, grid: WeightGrid, x_MK: Tensor | None) -> Tensor:
    step_NK = grid.step(residual_NK.shape[1])
    if x_MK is None:
        return grid.nearest(residual_NK / step_NK)
    return gptq_levels(residual_NK, step_NK, hessian(x_MK), grid.nearest)
