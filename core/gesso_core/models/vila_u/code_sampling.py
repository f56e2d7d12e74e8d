"""Choosing codes: guidance between two sets of logits, top-k, top-p, and a repeatable draw.

Sources: VILA-U's depth head (guidance in it only, then top-k, then top-p).
"""

import torch
from torch import Generator, Tensor

# B drawings   R rows of the network   K codes   T positions   D codes of a position


def guided(
    logits_RK: Tensor, conditional_B: Tensor, unconditional_B: Tensor, scales_B: Tensor
) -> Tensor:
    """``u + s (c - u)`` of every drawing, (B, K), fp32.

    Args:
        logits_RK: one row per conditional or unconditional prompt.
        conditional_B: for every drawing its row c.
        unconditional_B: for every drawing its row u; the same as c where there is no guidance.
        scales_B: guidance scales s.
    """
    c_BK, u_BK = logits_RK[conditional_B].float(), logits_RK[unconditional_B].float()
    unguided_B1 = (conditional_B == unconditional_B)[:, None]
    return torch.where(unguided_B1, c_BK, u_BK + scales_B[:, None] * (c_BK - u_BK))


def top_k_filter(logits_BK: Tensor, top_k_B: Tensor) -> Tensor:
    """Logits below the k-th largest become -inf; whatever equals the k-th stays.

    A k beyond the number of codes keeps all.
    """
    ordered_BK = logits_BK.sort(dim=-1, descending=True).values
    last_B1 = (top_k_B.clamp(1, logits_BK.shape[-1]) - 1)[:, None]
    return logits_BK.masked_fill(logits_BK < ordered_BK.gather(-1, last_B1), -torch.inf)


def top_p_filter(probabilities_BK: Tensor, top_p_B: Tensor) -> Tensor:
    """The most probable codes up to and with the one that reaches ``top_p``, renormalised."""
    ordered_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    return _first_of(ordered_BK, order_BK, top_p_B)


def probabilities(logits_BK: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """What is drawn from: top-k on the logits, softmax, top-p on the probabilities.

    The same as the two filters one after the other, with one sort for both.
    """
    ordered_BK, order_BK = logits_BK.sort(dim=-1, descending=True, stable=True)
    last_B1 = (top_k_B.clamp(1, logits_BK.shape[-1]) - 1)[:, None]
    below_BK = ordered_BK < ordered_BK.gather(-1, last_B1)
    kept_BK = ordered_BK.masked_fill(below_BK, -torch.inf)
    return _first_of(kept_BK.softmax(dim=-1), order_BK, top_p_B)


def _first_of(ordered_BK: Tensor, order_BK: Tensor, top_p_B: Tensor) -> Tensor:
    """Of probabilities in falling order the first up to ``top_p``, back in their own order."""
    before_BK = ordered_BK.cumsum(dim=-1) - ordered_BK
    before_BK[:, 0] = -1.0  # the most probable one always stays
    kept_BK = torch.where(before_BK < top_p_B[:, None], ordered_BK, 0.0)
    kept_BK = torch.zeros_like(kept_BK).scatter(-1, order_BK, kept_BK)
    return kept_BK / kept_BK.sum(dim=-1, keepdim=True)


def uniforms(seed: int, positions: int, depth: int) -> Tensor:
    """All random numbers (T, D) that one drawing uses: position by position, code by code.

    Drawn on the CPU, so that a drawing depends neither on its neighbours nor on the device.
    """
    generator = Generator().manual_seed(seed)
    return torch.rand((positions, depth), generator=generator, dtype=torch.float64)


def inverse_cdf(probabilities_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per row (B,): the first whose cumulative probability exceeds the number in [0, 1).

    In fp64, so that rounding in the sum of many small probabilities does not choose.
    """
    cdf_BK = probabilities_BK.double().cumsum(dim=-1)
    target_B1 = uniform_B.to(cdf_BK)[:, None] * cdf_BK[:, -1:]
    chosen_B = (cdf_BK <= target_B1).sum(dim=-1)
    last_B = (probabilities_BK > 0).to(torch.int64).cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(chosen_B, last_B)
