"""The low-rank branch: the part of a smoothed weight that stays in 16 bit.

    W ≈ up · down,   down [R, K] = Vᵀ[:R],   up [N, R] = U[:, :R] · S[:R]

The exact decomposition is a float64 SVD. The randomized one (Halko, Martinsson, Tropp 2011, the
method of `torch.svd_lowrank`) sketches R + 16 directions with two power iterations in fp32: the
error of the whole layer differs by about 1 %. The iterated branch refits to whatever the 4-bit grid
could not represent, and stops at the first increase of the error; there, every sketch starts from
the directions found before, which closes most of that 1 %.
"""

# N out channels   K in channels   R rank   Q sketched directions

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Svd = Literal["exact", "randomized"]
OVERSAMPLING: Final = 16
POWER_ITERATIONS: Final = 2


class Branch(NamedTuple):
    """Factors of the branch, fp32; ``down`` acts on the smoothed input."""

    down_RK: Tensor
    up_NR: Tensor

    def product(self) -> Tensor:
        """up · down, [N, K]."""
        return self.up_NR @ self.down_RK


class Decompose(Protocol):
    """A matrix to its branch; ``near`` is the branch of a similar matrix, if there is one."""

    def __call__(self, weight_NK: Tensor, /, *, near: Branch | None = None) -> Branch:
        """The branch."""


def low_rank_branch(
    weight_NK: Tensor,
    rank: int,
    svd: Svd,
    generator: torch.Generator,
    *,
    near: Branch | None = None,
) -> Branch:
    """The best approximation of a given rank; rank 0 gives empty factors.

    Args:
        weight_NK: fp32, smoothed.
        rank: at most min(N, K).
        svd: ``"exact"`` draws nothing from the generator.
        generator: on the CPU.
        near: branch of a similar matrix; the randomized decomposition starts from its directions.
    """
    if rank == 0:
        rows, columns = weight_NK.shape
        return Branch(weight_NK.new_zeros(0, columns), weight_NK.new_zeros(rows, 0))
    if svd == "randomized" and rank + OVERSAMPLING < min(weight_NK.shape):
        return _sketched(weight_NK, rank, generator, near)
    u, s, vh = torch.linalg.svd(weight_NK.double(), full_matrices=False)
    return Branch(vh[:rank].float(), (u[:, :rank] * s[:rank]).float())


def _sketched(
    weight_NK: Tensor, rank: int, generator: torch.Generator, near: Branch | None
) -> Branch:
    # Work on the wide orientation, so that the final small SVD is of a Q × min(N, K) matrix.
    rows, columns = weight_NK.shape
    tall = weight_NK if rows >= columns else weight_NK.mT
    fresh = rank + OVERSAMPLING if near is None else OVERSAMPLING
    sketch_KQ = torch.randn(tall.shape[1], fresh, generator=generator).to(tall)
    if near is not None:
        known = near.down_RK.mT if rows >= columns else near.up_NR
        sketch_KQ = torch.cat([known, sketch_KQ], dim=1)
    basis_NQ = torch.linalg.qr(tall @ sketch_KQ).Q
    for _ in range(POWER_ITERATIONS):
        basis_KQ = torch.linalg.qr(tall.mT @ basis_NQ).Q
        basis_NQ = torch.linalg.qr(tall @ basis_KQ).Q
    u, s, vh = torch.linalg.svd(basis_NQ.mT @ tall, full_matrices=False)
    left, right = basis_NQ @ u[:, :rank], vh[:rank]
    if rows >= columns:
        return Branch(right.contiguous(), left * s[:rank])
    return Branch(left.mT.contiguous(), right.mT * s[:rank])


class IteratedBranch(NamedTuple):
    """The branch of the smallest error.

    Attributes:
        branch: its factors.
        residual_NK: what is left of the weight, quantized and back.
        errors: one per iteration; the last may be the increase that ended them.
    """

    branch: Branch
    residual_NK: Tensor
    errors: list[float]


def iterate_branch(
    weight_NK: Tensor,
    *,
    iterations: int,
    decompose: Decompose,
    quantize: Callable[[Tensor], Tensor],
    error: Callable[[Branch, Tensor], float],
) -> IteratedBranch:
    """Alternate between decomposing W − Q(R) and quantizing R = W − up · down.

    Args:
        weight_NK: fp32, smoothed.
        iterations: at most; 1 is the branch of W itself.
        decompose: a matrix to its branch; each starts from the one before.
        quantize: a residual quantized and back.
        error: of a branch and a quantized residual, on calibration rows.
    """
    best: IteratedBranch | None = None
    branch: Branch | None = None
    errors: list[float] = []
    represented = torch.zeros_like(weight_NK)
    for _ in range(iterations):
        branch = decompose(weight_NK - represented, near=branch)
        represented = quantize(weight_NK - branch.product())
        errors.append(error(branch, represented))
        if best is not None and errors[-1] > min(errors[:-1]):
            break
        best = IteratedBranch(branch, represented, errors)
    assert best is not None, "at least one iteration"
    return best
