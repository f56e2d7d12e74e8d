"""Flow-DPM-Solver++ (2M): the second-order multistep solver that Sana uses, in 14 to 20 steps.

With ``α = 1 − σ``, ``λ = ln α − ln σ``, ``h = λ_{i+1} − λ_i`` and the clean estimate
``D_i = x_i − σ_i v_i``:

    x_{i+1} = (σ_{i+1}/σ_i) x_i − α_{i+1} (e^{−h} − 1) [ D_i + (D_i − D_{i−1}) h / (2 h_prev) ]

The bracket is ``D_i`` alone at the first and at the last step. Sources: DPM-Solver++
(arXiv 2211.01095), Sana (arXiv 2410.10629).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from gesso_core.errors import ConfigError
from gesso_core.sampling.flow_euler import shifted
from gesso_core.sampling.state import SamplerState, check_not_done, check_shift, check_steps


@dataclass(frozen=True)
class FlowDPMSolver:
    """Multistep sampler with the authors' grid.

    Attributes:
        shift: flow shift of the model: 3, at 4K 6.
        order: 2, or 1 for plain DDIM-like steps.
    """

    shift: float = 3.0
    order: int = 2
    stochastic = False

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if self.order not in (1, 2):
            raise ConfigError(f"order is {self.order!r}; this solver has orders 1 and 2")

    def start(self, noise: Tensor, steps: int) -> SamplerState:
        """Begin at σ_0 = shift(0.999) with unit Gaussian noise.

        The network is told times truncated to whole numbers, as it was in training.
        """
        levels = 1.0 - np.linspace(1.0, 1 / 1000, check_steps(steps) + 1)
        sigmas = np.flip(shifted(levels, self.shift))[:-1]
        return SamplerState(
            latent=noise.float(),
            levels=(*sigmas.astype(np.float32).tolist(), 0.0),
            timesteps=tuple(float(int(time)) for time in sigmas * 1000),
        )

    def model_input(self, state: SamplerState) -> tuple[Tensor, float]:
        """The latent as it is, and t = ⌊1000 σ⌋."""
        return state.latent, state.timesteps[state.index]

    def step(
        self, state: SamplerState, model_output: Tensor, noise: Tensor | None = None
    ) -> SamplerState:
        """Advance by one step of the order that the position in the schedule allows."""
        check_not_done(state)
        sigma, sigma_next = state.levels[state.index], state.levels[state.index + 1]
        clean = self.denoised(state, model_output)
        if sigma_next == 0:
            latent = clean
        else:
            h = _log_snr(sigma_next) - _log_snr(sigma)
            target = clean
            if self.order == 2 and state.previous is not None:
                h_previous = _log_snr(sigma) - _log_snr(state.levels[state.index - 1])
                target = clean + (clean - state.previous) * (0.5 * h / h_previous)
            gain = (1 - sigma_next) * math.expm1(-h)
            latent = (sigma_next / sigma) * state.latent - gain * target
        return replace(state, latent=latent, previous=clean, index=state.index + 1)

    def denoised(self, state: SamplerState, model_output: Tensor) -> Tensor:
        """x0 = x − σ v."""
        return state.latent - state.levels[state.index] * model_output.float()


def _log_snr(sigma: float) -> float:
    """λ = ln(1−σ) − ln σ, half the logarithm of the signal-to-noise ratio."""
    return math.log1p(-sigma) - math.log(sigma)
