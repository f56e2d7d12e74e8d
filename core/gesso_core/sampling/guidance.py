"""Guidance: how the predictions with and without the prompt are combined.

Sources: classifier-free guidance (arXiv 2207.12598); guidance in a limited interval
(arXiv 2404.07724).
"""

from torch import Tensor


def classifier_free(
    velocity_negative: Tensor, velocity_positive: Tensor, scale: float | Tensor
) -> Tensor:
    """``v_neg + scale · (v_pos − v_neg)`` in fp32.

    Args:
        velocity_negative: prediction for the negative (or empty) prompt.
        velocity_positive: prediction for the prompt, of the same shape.
        scale: 1 is the prompt alone; a tensor must broadcast, e.g. (B, 1, 1, 1) for one per sample.
    """
    negative = velocity_negative.float()
    return negative + scale * (velocity_positive.float() - negative)


def is_guided(timestep: float, scale: float, interval: tuple[float, float] = (0.0, 1000.0)) -> bool:
    """Whether a step needs the negative branch: scale other than 1, and a time inside the interval.

    Args:
        timestep: what the network is told, 0..1000.
        scale: guidance scale.
        interval: first and last time that guidance applies to.
    """
    return scale != 1.0 and interval[0] <= timestep <= interval[1]
