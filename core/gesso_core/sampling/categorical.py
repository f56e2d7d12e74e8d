"""Drawing codes: filters of logits, draws from one uniform number per row, softened draws.

Draws take their randomness as tensors, so that whoever draws decides where it comes from. A row's
draw depends on nothing but its own logits and its own number.
"""

import torch
from torch import Tensor

# … any leading axes   V vocabulary

BLOCKED = float("-inf")


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Block all but the k best codes of each row; codes as good as the k-th stay. 0 is off.

    ``k`` beyond the vocabulary keeps everything.
    """
    size = logits.shape[-1]
    if not 0 < k < size:
        return logits
    worst = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < worst, BLOCKED)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Block the least likely codes whose probabilities add up to at most ``1 - p``. 0 is off.

    The best code of a row always stays.
    """
    if not p > 0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=False)
    blocked = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    blocked[..., -1] = False
    return logits.masked_fill(blocked.scatter(-1, order, blocked), BLOCKED)


def filtered(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Both filters, the k best first."""
    return top_p_filter(top_k_filter(logits, top_k), top_p)


def draw_codes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Codes (…) by the inverse of the cumulative distribution, in fp64.

    Args:
        logits: (…, V), blocked ones minus infinity.
        uniform: (…) numbers in [0, 1), one per row.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform.double()[..., None] * cumulative[..., -1:]
    # Blocked codes add nothing, so the first code beyond the target is never one of them.
    codes = torch.searchsorted(cumulative, target.contiguous(), right=True)[..., 0]
    return codes.clamp(max=logits.shape[-1] - 1)


def gumbel_mixture(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """``softmax((logits + g) / τ)``, (…, V): weights with which the codes are mixed."""
    return ((logits + gumbel) / temperature).softmax(dim=-1)


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones in (0, 1)."""
    return -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
