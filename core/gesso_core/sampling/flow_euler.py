"""Euler steps along the velocity of a rectified flow.

    x_{i+1} = x_i + (σ_{i+1} − σ_i) v_i,   shift(σ) = sσ / (1 + (s−1)σ),   the network gets 1000 σ

Sources: flow matching (arXiv 2210.02747); the shifted schedule is that of SD3 (arXiv 2403.03206).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gesso_core.errors import ConfigError
from gesso_core.sampling.state import SamplerState, check_not_done, check_shift, check_steps

Floats = NDArray[np.float64]
Compat = Literal["diffusers", "single_shift"]


def shifted(sigmas: Floats, shift: float) -> Floats:
    """Move a schedule in [0, 1] towards noise (shift > 1) or data (shift < 1)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@dataclass(frozen=True)
class FlowEuler:
    """First-order sampler.

    Attributes:
        shift: flow shift of the model.
        compat: "diffusers" reads the end points of the grid from a table that is shifted already,
            and shifts again, as that library does; "single_shift" shifts once.
    """

    shift: float = 3.0
    compat: Compat = "diffusers"
    stochastic = False

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if self.compat not in ("diffusers", "single_shift"):
            raise ConfigError(f"compat is {self.compat!r}; use 'diffusers' or 'single_shift'")

    def start(self, noise: Tensor, steps: int) -> SamplerState:
        """Begin at σ = 1 with unit Gaussian noise."""
        last = np.array([1 / 1000])
        if self.compat == "diffusers":
            last = shifted(last, self.shift).astype(np.float32).astype(np.float64)
        grid = np.linspace(1.0, last[0], check_steps(steps))
        sigmas = shifted(grid, self.shift).astype(np.float32)
        return SamplerState(
            latent=noise.float(),
            levels=(*sigmas.tolist(), 0.0),
            timesteps=tuple((sigmas * np.float32(1000)).tolist()),
        )

    def model_input(self, state: SamplerState) -> tuple[Tensor, float]:
        """The latent as it is, and t = 1000 σ."""
        return state.latent, state.timesteps[state.index]

    def step(
        self, state: SamplerState, model_output: Tensor, noise: Tensor | None = None
    ) -> SamplerState:
        """Follow the velocity to the next noise level."""
        check_not_done(state)
        distance = state.levels[state.index + 1] - state.levels[state.index]
        latent = state.latent + distance * model_output.float()
        return replace(state, latent=latent, index=state.index + 1)

    def denoised(self, state: SamplerState, model_output: Tensor) -> Tensor:
        """x0 = x − σ v."""
        return state.latent - state.levels[state.index] * model_output.float()
