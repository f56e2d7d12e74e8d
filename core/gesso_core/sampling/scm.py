"""Few-step sampling of a consistency model in TrigFlow angles (SANA-Sprint).

``z = cos τ · x0 + sin τ · σ_d ε`` with angles from π/2 to 0 and data of standard deviation σ_d. The
network is a flow model, so its input and output are converted. With
``s = sin τ / (sin τ + cos τ)`` and ``n = √(s² + (1−s)²)``:

    input = (z/σ_d) · n,  time s;      F = σ_d [(1−2s) · input + (1−2s+2s²) · v] / n
    x0 = cos τ · z − sin τ · F;        z ← cos τ' · x0 + sin τ' · σ_d η     with fresh noise η

Sources: sCM (arXiv 2410.11081), SANA-Sprint (arXiv 2503.09641).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from gesso_core.errors import ConfigError
from gesso_core.sampling.state import SamplerState, check_not_done, check_steps


@dataclass(frozen=True)
class SCM:
    """Consistency sampler for any number of steps; one to four are usual.

    Guidance is an input of the network: there is no second, unconditional branch.

    Attributes:
        sigma_data: standard deviation of the data.
        max_angle: first angle.
        middle_angle: second angle of a two-step schedule; None spaces the angles evenly, as for any
            other number of steps.
    """

    sigma_data: float = 0.5
    max_angle: float = 1.57080
    middle_angle: float | None = 1.3
    stochastic = True

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ConfigError(f"sigma_data is {self.sigma_data!r}; it must be positive")
        if not 0 < self.max_angle <= 1.5709:
            raise ConfigError(f"max_angle is {self.max_angle!r}; it must lie in (0, π/2]")
        if self.middle_angle is not None and not 0 < self.middle_angle < self.max_angle:
            raise ConfigError(
                f"middle_angle is {self.middle_angle!r}; it must lie in (0, {self.max_angle})"
            )

    def start(self, noise: Tensor, steps: int) -> SamplerState:
        """Begin at the largest angle with σ_d times unit Gaussian noise."""
        if check_steps(steps) == 2 and self.middle_angle is not None:
            angles = np.array([self.max_angle, self.middle_angle, 0.0])
        else:
            angles = np.linspace(self.max_angle, 0.0, steps + 1)
        levels = tuple(angles.astype(np.float32).tolist())
        return SamplerState(
            latent=noise.float() * self.sigma_data,
            levels=levels,
            timesteps=tuple(_flow_time(angle) for angle in levels[:-1]),
            data_scale=self.sigma_data,
        )

    def model_input(self, state: SamplerState) -> tuple[Tensor, float]:
        """The latent in the scale of the flow model, and the flow time s in [0, 1]."""
        time = state.timesteps[state.index]
        return state.latent * (_norm(time) / self.sigma_data), time

    def step(
        self, state: SamplerState, model_output: Tensor, noise: Tensor | None = None
    ) -> SamplerState:
        """Estimate the clean latent and mix it with fresh noise; the last step keeps it clean.

        ``noise`` is a unit Gaussian like the latent, not needed at the last step.
        """
        check_not_done(state)
        angle = state.levels[state.index + 1]
        latent = self._clean(state, model_output)
        if angle > 0:
            if noise is None:
                raise ValueError("SCM mixes in fresh noise between steps; pass noise to step()")
            latent = math.cos(angle) * latent + (math.sin(angle) * self.sigma_data) * noise.float()
        return replace(state, latent=latent, index=state.index + 1)

    def denoised(self, state: SamplerState, model_output: Tensor) -> Tensor:
        """x0 in the scale of the network's data."""
        return self._clean(state, model_output) / self.sigma_data

    def _clean(self, state: SamplerState, model_output: Tensor) -> Tensor:
        angle = state.levels[state.index]
        network_latent, s = self.model_input(state)
        velocity = (1 - 2 * s) * network_latent + (1 - 2 * s + 2 * s * s) * model_output.float()
        trig_velocity = velocity * (self.sigma_data / _norm(s))
        return math.cos(angle) * state.latent - math.sin(angle) * trig_velocity


def _flow_time(angle: float) -> float:
    return math.sin(angle) / (math.sin(angle) + math.cos(angle))


def _norm(time: float) -> float:
    return math.hypot(time, 1 - time)
