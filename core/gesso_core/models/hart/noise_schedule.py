"""The noise schedule of the residual diffusion, and its variational bound.

Squared-cosine cumulative α with offset 0.008 and β at most 0.999 (arXiv 2102.09672, equation 17);
variances are learned between their two bounds (section 3.1 there). Tables are fp64.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# R rows   C channels   T steps

OFFSET = 0.008
LARGEST_BETA = 0.999
HALF_BIN = 1.0 / 255.0  # of the discrete likelihood at the last step


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """β of every step and all that follows from it; ``times`` is what the network is told."""

    betas_T: Tensor
    times: tuple[int, ...]

    @classmethod
    def squared_cosine(cls, steps: int) -> "NoiseSchedule":
        """The schedule that the network is trained with."""

        def remaining(time: float) -> float:
            return math.cos((time + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

        betas = [
            min(1 - remaining((i + 1) / steps) / remaining(i / steps), LARGEST_BETA)
            for i in range(steps)
        ]
        return cls(torch.tensor(betas, dtype=torch.float64, device="cpu"), tuple(range(steps)))

    def __len__(self) -> int:
        return len(self.times)

    def respaced(self, steps: int) -> "NoiseSchedule":
        """``steps`` of these steps at equal distances, the first and the last among them."""
        stride = (len(self) - 1) / (steps - 1) if steps > 1 else 0.0
        kept = tuple(round(i * stride) for i in range(steps))
        cumulative = self.cumulative[list(kept)]
        before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), cumulative[:-1]])
        return NoiseSchedule(1 - cumulative / before, kept)

    @cached_property
    def cumulative(self) -> Tensor:
        """Product of all ``1 - β`` so far."""
        return (1 - self.betas_T).cumprod(dim=0)

    @cached_property
    def _before(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.cumulative[:-1]])

    @cached_property
    def least_log_variance(self) -> Tensor:
        """Smallest log variance of a step; that of step 0 is taken from step 1."""
        variance = self.betas_T * (1 - self._before) / (1 - self.cumulative)
        return torch.cat([variance[1:2] if len(self) > 1 else variance, variance[1:]]).log()

    @cached_property
    def mean_of_clean(self) -> Tensor:
        """Weight of the clean value in the mean of a step."""
        return self.betas_T * self._before.sqrt() / (1 - self.cumulative)

    @cached_property
    def mean_of_noisy(self) -> Tensor:
        """Weight of the noisy value in the mean of a step."""
        return (1 - self._before) * (1 - self.betas_T).sqrt() / (1 - self.cumulative)

    @cached_property
    def clean_of_noisy(self) -> Tensor:
        """Weight of the noisy value in the clean one."""
        return (1 / self.cumulative).sqrt()

    @cached_property
    def clean_of_noise(self) -> Tensor:
        """Weight, to be subtracted, of the noise in the clean value."""
        return (1 / self.cumulative - 1).sqrt()

    def noisy(self, clean_RC: Tensor, time_R: Tensor, noise_RC: Tensor) -> Tensor:
        """The clean value at its time."""
        kept = _at(self.cumulative.sqrt(), time_R, clean_RC)
        return kept * clean_RC + _at((1 - self.cumulative).sqrt(), time_R, clean_RC) * noise_RC

    def clean(self, noisy_RC: Tensor, index: int | Tensor, noise_RC: Tensor) -> Tensor:
        """The clean value that a predicted noise implies."""
        kept = _at(self.clean_of_noisy, index, noisy_RC)
        return kept * noisy_RC - _at(self.clean_of_noise, index, noisy_RC) * noise_RC

    def mean(self, clean_RC: Tensor, noisy_RC: Tensor, index: int | Tensor) -> Tensor:
        """Mean of the value one step earlier."""
        return (
            _at(self.mean_of_clean, index, noisy_RC) * clean_RC
            + _at(self.mean_of_noisy, index, noisy_RC) * noisy_RC
        )

    def log_variance(self, variance_RC: Tensor, index: int | Tensor) -> Tensor:
        """Log variance that the variance channels choose between the two bounds."""
        smallest = _at(self.least_log_variance, index, variance_RC)
        largest = _at(self.betas_T.log(), index, variance_RC)
        share = (variance_RC + 1) / 2
        return share * largest + (1 - share) * smallest

    def posterior(
        self, noisy_RC: Tensor, index: int, noise_RC: Tensor, variance_RC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of a step backwards; the clean value is clamped to [-1, 1]."""
        clean = self.clean(noisy_RC, index, noise_RC).clamp(-1, 1)
        return self.mean(clean, noisy_RC, index), self.log_variance(variance_RC, index)


def variational_bits(
    schedule: NoiseSchedule,
    clean_RC: Tensor,
    noisy_RC: Tensor,
    time_R: Tensor,
    noise_RC: Tensor,
    variance_RC: Tensor,
) -> Tensor:
    """The variational term of each row, in bits, averaged over channels.

    The divergence of the true step from the predicted one; at step 0 the negative log likelihood
    of the clean value in bins of width 2/255.
    """
    true_mean = schedule.mean(clean_RC, noisy_RC, time_R)
    true_log = _at(schedule.least_log_variance, time_R, noisy_RC).expand_as(true_mean)
    mean = schedule.mean(schedule.clean(noisy_RC, time_R, noise_RC), noisy_RC, time_R)
    log_variance = schedule.log_variance(variance_RC, time_R)
    divergence = 0.5 * (
        log_variance
        - true_log
        - 1
        + (true_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = _binned_log_likelihood(clean_RC, mean, 0.5 * log_variance)
    nats_RC = torch.where((time_R == 0)[:, None], -likelihood, divergence)
    return nats_RC.mean(dim=-1) / math.log(2.0)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    inverse, centered = (-log_scale).exp(), x - mean
    upper = _normal_cdf(inverse * (centered + HALF_BIN))
    lower = _normal_cdf(inverse * (centered - HALF_BIN))
    inner = (upper - lower).clamp(min=1e-12).log()
    outer = torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inner)
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), outer)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table_T: Tensor, index: int | Tensor, like: Tensor) -> Tensor:
    """Entries of a table, to be broadcast over channels."""
    if isinstance(index, int):
        return table_T[index].to(like.device, torch.float32)
    return table_T.to(like.device, torch.float32)[index][:, None]
