"""GPTQ (arXiv 2210.17323) on the residual of a layer: rounding compensated column by column.

    H = (2 / M) Σ xᵀx,   U = upper Cholesky factor of (H + damping)⁻¹
    for each column k:   q = nearest(w_k),   w_j −= (w_k − q) / U_kk · U_kj   for all j > k

The scales are fixed beforehand from the untouched residual; only the rounding changes. Columns are
visited in the order of decreasing diagonal of H.
"""

# M tokens   N out channels   K in channels

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from gesso_core.errors import NumericalError

BLOCK: Final = 128
DAMPING: Final = 0.01
MOST_TRIES: Final = 250


def hessian(x_MK: Tensor) -> Tensor:
    """(2 / M) Σ xᵀx, fp32 [K, K]; x is the smoothed input."""
    x_MK = x_MK.float()
    return (2 / x_MK.shape[0]) * (x_MK.mT @ x_MK)


def gptq_levels(
    weight_NK: Tensor,
    step_NK: Tensor,
    hessian_KK: Tensor,
    nearest: Callable[[Tensor], Tensor],
    *,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Tensor:
    """The levels, in units of the step, that keep the output of the layer closest; fp32 [N, K].

    Args:
        weight_NK: residual.
        step_NK: what one unit of the code is worth at every element; not changed.
        hessian_KK: `hessian` of the smoothed inputs.
        nearest: values in units of the step to levels.
        block: columns that are finished before their errors reach the rest.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        NumericalError: H cannot be factorized with any damping that was tried.
    """
    dead_K = hessian_KK.diagonal() == 0
    hessian_KK = hessian_KK + torch.diag(dead_K.to(hessian_KK.dtype))
    weight_NK = weight_NK.float().masked_fill(dead_K, 0)
    order_K = hessian_KK.diagonal().argsort(descending=True)
    weight_NK, step_NK = weight_NK[:, order_K], step_NK[:, order_K]
    factor_KK = _inverse_factor(hessian_KK[order_K][:, order_K], damping)
    levels_NK = torch.empty_like(weight_NK)
    for start in range(0, weight_NK.shape[1], block):
        part = slice(start, start + block)
        levels_NK[:, part], error_NB = _round_block(
            weight_NK[:, part], step_NK[:, part], factor_KK[part, part], nearest
        )
        weight_NK[:, start + block :] -= error_NB @ factor_KK[part, start + block :]
    return levels_NK[:, order_K.argsort()]


def _round_block(
    weight_NB: Tensor, step_NB: Tensor, factor_BB: Tensor, nearest: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    # Columns as rows: each step then reads and writes contiguous memory.
    weight_BN, step_BN = weight_NB.mT.contiguous(), step_NB.mT.contiguous()
    levels_BN, error_BN = torch.empty_like(weight_BN), torch.empty_like(weight_BN)
    for k in range(weight_BN.shape[0]):
        levels_BN[k] = nearest(weight_BN[k] / step_BN[k])
        error_BN[k] = (weight_BN[k] - levels_BN[k] * step_BN[k]) / factor_BB[k, k]
        weight_BN[k:] -= factor_BB[k, k:, None] * error_BN[k]
    return levels_BN.mT, error_BN.mT


def _inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse; the damping grows until there is one."""
    diagonal = hessian_KK.diagonal().mean()
    for tries in range(1, MOST_TRIES + 1):
        damped = hessian_KK + torch.diag((tries * damping * diagonal).expand(len(hessian_KK)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        inverse_KK: Tensor = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse_KK, upper=True)
        if not failed:
            return torch.as_tensor(upper)
    raise NumericalError(
        f"the {len(hessian_KK)} × {len(hessian_KK)} input statistics of a layer cannot be inverted "
        f"even with a damping of {MOST_TRIES * damping:g} times their mean; check the calibration "
        "inputs for constant or extreme channels, or quantize without GPTQ"
    )
