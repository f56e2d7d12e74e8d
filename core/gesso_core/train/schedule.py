"""Schedules that follow the clock, so that a run which ends early is annealed, and the EMA."""

import math
import time
from collections.abc import Iterable

import torch
from torch import nn


class Clock:
    """Seconds used of a budget, over all restarts of a run."""

    def __init__(self, budget_s: float, used_s: float = 0.0) -> None:
        self.budget_s = budget_s
        self._used_before = used_s
        self._started = time.monotonic()

    @property
    def used_s(self) -> float:
        """Seconds used so far, in this process and in those before it."""
        return self._used_before + time.monotonic() - self._started

    @property
    def fraction(self) -> float:
        """Share of the budget that is used, from 0 to 1."""
        return min(1.0, self.used_s / self.budget_s)


def learning_rate(
    fraction: float, step: int, *, peak: float, floor: float, hold: float, warm_up: int
) -> float:
    """Linear warm-up by steps, constant until ``hold`` of the budget, then cosine down.

    Args:
        fraction: share of the budget that is used.
        step: number of the update, from 0.
        peak: highest learning rate.
        floor: last learning rate, as a share of ``peak``.
        hold: share of the budget at which the descent begins.
        warm_up: number of updates until ``peak``.
    """
    descent = max(0.0, (fraction - hold) / (1 - hold))
    shape = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, descent)))
    return peak * min(1.0, (step + 1) / warm_up) * shape


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class Ema:
    """Exponential moving average of a model's parameters, with a short horizon at the start."""

    def __init__(self, model: nn.Module, decay: float, start: int = 10) -> None:
        self.decay, self.start = decay, start
        self.steps = 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model: decay = min(decay, (step + 1) / (step + start))."""
        decay = min(self.decay, (self.steps + 1) / (self.steps + self.start))
        self.steps += 1
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[name] for name in self.shadow], 1 - decay
        )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters with their average."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.shadow[name])
