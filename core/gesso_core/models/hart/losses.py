"""One training step of HART: cross-entropy of the codes and the diffusion loss of the residual.

The residual's target is the latent that is left at the last scale minus the code that was *sampled*
from the current prediction, as it will be when drawing. At large scales most tokens of the last
scale are left out (arXiv 2410.10812, section 3.4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gesso_core.models.hart.residual_diffusion import DiffusionLosses
from gesso_core.models.hart.transformer import HART, HARTText, tokens_at
from gesso_core.sampling.categorical import draw_codes, filtered

# B batch   N tokens of the last scale   K kept ones   M all predicted tokens   V vocabulary
# R rows of the residual network   C latent channels   D width

TOP_K, TOP_P = 600, 0.96  # of the codes that the residual's target is taken from
DROP_MEAN, DROP_STD, DROP_LOW, DROP_HIGH = 1.0, 0.25, 0.5, 1.0
KEPT_AT_LEAST = 32
Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainingTargets:
    """What a batch is trained on.

    ``indices``: per scale (B, p²). ``teacher_BMC``: inputs of scale 2 and later. ``rest_BNC``: the
    latent that is left before the last scale's code is subtracted.
    """

    indices: list[Tensor]
    teacher_BMC: Tensor
    rest_BNC: Tensor


@dataclass(frozen=True)
class TrainingLosses:
    """Cross-entropy per token and diffusion loss per row, with what they were computed from."""

    cross_entropy_BM: Tensor
    diffusion: DiffusionLosses
    logits_BMV: Tensor
    sampled_BK: Tensor
    residual_RC: Tensor
    condition_RD: Tensor

    @property
    def total(self) -> Tensor:
        """Mean of both, added; their published weights are unknown."""
        return self.cross_entropy_BM.mean() + self.diffusion.total.mean()


def training_losses(
    model: HART,
    text: HARTText,
    targets: TrainingTargets,
    codebook_VC: Tensor,
    *,
    choose: Choose,
    draw_noise: Callable[[int], tuple[Tensor, Tensor]],
    kept_BK: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> TrainingLosses:
    """Forward and losses of one batch.

    Args:
        model: the transformer.
        text: embedded texts, those of dropped samples already empty.
        targets: codes, teacher inputs and residual.
        codebook_VC: the tokenizer's codes.
        choose: codes (B, K) from the logits (B, K, V) of the last scale; see `sampled_codes`.
        draw_noise: times (R,) and noise (R, C) for so many rows of the residual network.
        kept_BK: tokens of the last scale that take part; None is all. See `kept_tokens`.
        label_smoothing: share of the probability that is spread over all codes.
    """
    config = model.config
    states_BMD = model(text, targets.teacher_BMC, kept_BK)
    logits_BMV = model.logits(states_BMD, text)
    last_BN, rest_BNC = targets.indices[-1], targets.rest_BNC
    if kept_BK is not None:
        last_BN = last_BN.gather(1, kept_BK)
        rest_BNC = tokens_at(rest_BNC, kept_BK)
    wanted_BM = torch.cat([*targets.indices[:-1], last_BN], dim=1)
    cross_entropy = F.cross_entropy(
        logits_BMV.mT, wanted_BM, reduction="none", label_smoothing=label_smoothing
    )
    count = last_BN.shape[1]
    sampled_BK = choose(logits_BMV[:, -count:].detach())
    codes_BKC = codebook_VC[sampled_BK]
    condition_BKD = model.residual_condition(states_BMD[:, -count:], codes_BKC)
    repeats = config.diffusion_repeats
    residual_RC = (rest_BNC - codes_BKC).flatten(0, 1).repeat(repeats, 1)
    condition_RD = condition_BKD.flatten(0, 1).repeat(repeats, 1)
    time_R, noise_RC = (t.to(residual_RC.device) for t in draw_noise(len(residual_RC)))
    losses = model.residual.losses(residual_RC, condition_RD, time_R, noise_RC)
    return TrainingLosses(cross_entropy, losses, logits_BMV, sampled_BK, residual_RC, condition_RD)


def sampled_codes(
    logits_BKV: Tensor, generator: Generator, *, top_k: int = TOP_K, top_p: float = TOP_P
) -> Tensor:
    """Codes (B, K) drawn as published from the best 600 within 96 % of the probability."""
    kept = filtered(logits_BKV, top_k=top_k, top_p=top_p)
    return draw_codes(kept, torch.rand(kept.shape[:-1], generator=generator).to(kept.device))


def drop_ratio(generator: Generator) -> float:
    """Share of the last scale's tokens to leave out: a normal of mean 1 and std ¼, in [½, 1]."""
    low, high = ((edge - DROP_MEAN) / DROP_STD for edge in (DROP_LOW, DROP_HIGH))
    start, end = (0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in (low, high))
    chance = start + (end - start) * torch.rand((), generator=generator, dtype=torch.float64)
    return float(DROP_MEAN + DROP_STD * torch.special.ndtri(chance))


def random_orders(batch: int, tokens: int, generator: Generator) -> Tensor:
    """One permutation of the tokens per sample, (B, N)."""
    return torch.rand((batch, tokens), generator=generator).argsort(dim=1)


def kept_tokens(orders_BN: Tensor, ratio: float) -> Tensor:
    """The tokens (B, K) that stay, in raster order, when the first of each order are left out.

    At least 32 stay, or all where there are no more.
    """
    tokens = orders_BN.shape[1]
    dropped = max(0, min(math.ceil(tokens * ratio), tokens - KEPT_AT_LEAST))
    return orders_BN[:, dropped:].sort(dim=1).values
