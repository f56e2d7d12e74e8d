"""Smoothing: the vector λ that moves outliers of the input into the weight.

    λ_c(α, β) = span_x(c)^α / span_w(c)^β          x Wᵀ = (x / λ) (W diag(λ))ᵀ

The grid of candidates and the two spans are those of SVDQuant's calibration. Candidates are judged
by the output of the quantized layer, its low-rank branch included: the branch changes which λ is
best, so the two are searched together.
"""

# M tokens   N out channels   K in channels

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from gesso_core.quant.low_rank import Decompose

Span = Literal["AbsMax", "RootMeanSquare"]
Exponents = tuple[float, float]


def span(x_MK: Tensor, kind: Span = "AbsMax") -> Tensor:
    """How far each channel reaches over all rows, fp32 [K]."""
    x_MK = x_MK.float()
    if kind == "AbsMax":
        return x_MK.abs().amax(0)
    return x_MK.square().mean(0).sqrt()


_FAMILIES: Final[dict[tuple[int, int], str]] = {
    # (sign of alpha, beta) to families: i of the input, w of the weight, o opposed, b both
    (1, 1): "b",
    (1, 0): "i",
    (1, -1): "o",
    (1, -2): "io",
    (0, 1): "w",
    (0, 0): "iw",
    (0, -1): "wo",
    (0, -2): "iwo",
}


def exponent_pairs(grids: int, alpha: float = 0.5, beta: float = -2) -> list[Exponents]:
    """The candidates (α, β) in the authors' order; (0, 0) is no smoothing.

    Args:
        grids: n; the exponents are a = i / n for i = 1..n−1.
        alpha: positive or 0; its size does not matter.
        beta: which families follow (0, 0). With a positive alpha: (a, a) for a positive beta,
            (a, 0) for 0, (a, 1 − a) for −1, (a, 0) and then (a, 1 − a) for −2.

    Raises:
        ValueError: another α or β.
    """
    steps = [i / grids for i in range(1, grids)]
    families: dict[str, list[Exponents]] = {
        "i": [(a, 0.0) for a in steps],
        "w": [(0.0, a) for a in steps],
        "o": [(a, 1 - a) for a in steps],
        "b": [(a, a) for a in steps],
    }
    chosen = _FAMILIES.get((math.ceil(alpha), math.ceil(beta))) if 0 <= alpha <= 1 else None
    if chosen is None or not (0 <= beta <= 1 or beta in (-1, -2)):
        raise ValueError(
            f"no candidates for alpha={alpha}, beta={beta}; give alpha in 0..1, and beta in 0..1, "
            "−1 or −2"
        )
    return [(0.0, 0.0), *(pair for family in chosen for pair in families[family])]


def smooth_scale(x_span_K: Tensor, w_span_K: Tensor, exponents: Exponents) -> Tensor:
    """λ in fp32 [K]; an exact 0 becomes 1, one NaN or infinity makes all of it 1."""
    alpha, beta = exponents
    smooth_K = torch.ones_like(x_span_K) if alpha == 0 else x_span_K.pow(alpha)
    if beta != 0:
        smooth_K = smooth_K / w_span_K.pow(beta)
    smooth_K = torch.where(smooth_K == 0, 1.0, smooth_K)
    return smooth_K if bool(smooth_K.isfinite().all()) else torch.ones_like(smooth_K)


class SmoothSearch(NamedTuple):
    """The λ of the smallest error.

    Attributes:
        smooth_K: λ.
        exponents: its α and β.
        errors: squared error per candidate, in order.
    """

    smooth_K: Tensor
    exponents: Exponents
    errors: list[float]


def search_smooth(
    pairs: Sequence[Exponents],
    scale_of: Callable[[Exponents], Tensor],
    error_of: Callable[[Tensor], float],
) -> SmoothSearch:
    """Try every pair in order; of equal errors the later wins, as in the authors' search."""
    best: tuple[Tensor, Exponents] | None = None
    errors: list[float] = []
    for pair in pairs:
        smooth_K = scale_of(pair)
        errors.append(error_of(smooth_K))
        if errors[-1] <= min(errors):
            best = smooth_K, pair
    assert best is not None, "at least one candidate, and finite errors"
    return SmoothSearch(*best, errors)


def quantized_output(
    weight_NK: Tensor,
    x_MK: Tensor,
    smooth_K: Tensor,
    *,
    decompose: Decompose,
    quantize_weight: Callable[[Tensor], Tensor],
    quantize_input: Callable[[Tensor], Tensor],
) -> Tensor:
    """What the layer gives with this λ and the branch of its smoothed weight, without bias [M, N].

    Args:
        weight_NK: fp32.
        x_MK: fp32.
        smooth_K: λ.
        decompose: a matrix to its branch.
        quantize_weight: a residual quantized and back.
        quantize_input: a smoothed input quantized and back.
    """
    smoothed_NK, smoothed_MK = weight_NK * smooth_K, x_MK / smooth_K
    branch = decompose(smoothed_NK)
    residual_NK = quantize_weight(smoothed_NK - branch.product())
    low_rank_MR = smoothed_MK @ branch.down_RK.mT
    return torch.addmm(low_rank_MR @ branch.up_NR.mT, quantize_input(smoothed_MK), residual_NK.mT)
