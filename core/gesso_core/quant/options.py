"""How a linear layer is to be quantized, and what came of it."""

from dataclasses import dataclass
from typing import Final

import torch

from gesso_core.errors import ConfigError
from gesso_core.quant.low_rank import Svd
from gesso_core.quant.record import ActivationFormat, WeightFormat

HALF_TYPES: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantOptions:
    """One layer's recipe. Plain rounding, for comparison, is ``rank=0, smooth=False``.

    Attributes:
        weight: number format of the residual.
        activation: number format of the input at run time; ``"16bit"`` makes a weight-only layer.
        rank: of the 16-bit branch; 0 leaves it out.
        grids: n of the smoothing search, 2n − 1 candidates.
        iterations: most refits of the branch; 1 keeps the branch of the smoothed weight.
        svd: ``"exact"`` is float64, for comparison.
        gptq: compensate the rounding of the residual; wants about five input rows per column.
        dtype: 16-bit type of everything that is not codes.
        smooth: whether to search λ; without, λ = 1.
        seed: of the randomized SVD and of the choice of rows.
        search_rows: calibration rows that judge candidates and iterations.

    Raises:
        ConfigError: a value out of range, or formats that do not go together.
    """

    weight: WeightFormat = "int4"
    activation: ActivationFormat = "int4"
    rank: int = 32
    grids: int = 20
    iterations: int = 100
    svd: Svd = "randomized"
    gptq: bool = False
    dtype: torch.dtype = torch.bfloat16
    smooth: bool = True
    seed: int = 0
    search_rows: int = 512

    def __post_init__(self) -> None:
        least = {"rank": 0, "grids": 1, "iterations": 1, "search_rows": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, give at least {bound}", field=name
                )
        if self.dtype not in HALF_TYPES:
            raise ConfigError(
                f"dtype is {self.dtype}, a quantized layer stores torch.bfloat16 or torch.float16",
                field="dtype",
            )
        if self.activation == "nvfp4" and self.weight != "nvfp4":
            raise ConfigError(
                f"nvfp4 activations need nvfp4 weights, not {self.weight}; "
                f"use activation={self.weight!r}",
                field="activation",
            )


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How well one layer was quantized, measured on rows that calibration did not see.

    Attributes:
        error: relative Frobenius error of the output of the linear.
        naive_error: the same with plain rounding: no λ, no branch, no GPTQ.
        alpha: exponent of the input's span in λ.
        beta: exponent of the weight's span in λ.
        iterations: refits of the branch that were tried.
        rank: of the branch.
        rows: input rows that were given.
        seconds: wall time.
    """

    error: float
    naive_error: float
    alpha: float
    beta: float
    iterations: int
    rank: int
    rows: int
    seconds: float
