"""What every sampler shares: where a sample stands, and the verbs that move it.

Samplers are immutable; all that changes is in an explicit `SamplerState`. So samples of one batch
may stand at different steps of different schedules, and a step can be taken twice with the same
outcome.

    state = sampler.start(noise, steps=20)
    while not state.done:
        latent, timestep = sampler.model_input(state)
        noise = next(noises) if sampler.stochastic else None
        state = sampler.step(state, model(latent, timestep), noise)
    image = decode(state.result)
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gesso_core.errors import ConfigError, InvalidRequest

MAX_STEPS = 1000  # the number of noise levels of the training schedule


@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """One sample (or a batch in lockstep) on its way from noise to data.

    Attributes:
        latent: the current latent, fp32, of any shape.
        levels: noise level (σ of a flow, angle of TrigFlow) before each step and after the last;
            steps + 1 numbers.
        timesteps: what the network is told at each step.
        index: number of steps taken.
        previous: clean estimate of the step before, for multistep solvers.
        data_scale: standard deviation that the sampler gives to data; the result is divided by it.
    """

    latent: Tensor
    levels: tuple[float, ...]
    timesteps: tuple[float, ...]
    index: int = 0
    previous: Tensor | None = None
    data_scale: float = 1.0

    @property
    def steps(self) -> int:
        """Number of steps from noise to data."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.index == self.steps

    @property
    def result(self) -> Tensor:
        """The finished latent, scaled as the network's data."""
        if not self.done:
            raise ValueError(f"only {self.index} of {self.steps} steps were taken")
        return self.latent / self.data_scale


class Sampler(Protocol):
    """A solver of the reverse process."""

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs a fresh unit Gaussian at every step."""
        ...

    def start(self, noise: Tensor, steps: int) -> SamplerState:
        """Stand at the beginning with unit Gaussian noise.

        Raises:
            InvalidRequest: fewer than one step, or more than 1000.
        """
        ...

    def model_input(self, state: SamplerState) -> tuple[Tensor, float]:
        """The latent (fp32) and the time that the network wants for the next step."""
        ...

    def step(
        self, state: SamplerState, model_output: Tensor, noise: Tensor | None = None
    ) -> SamplerState:
        """One step further; pure, computed in fp32."""
        ...

    def denoised(self, state: SamplerState, model_output: Tensor) -> Tensor:
        """The clean latent that the network sees from here, scaled as its data; for previews."""
        ...


def check_steps(steps: int) -> int:
    """A usable number of steps.

    Raises:
        InvalidRequest: when it is none.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise InvalidRequest(
            f"steps is {steps!r}; it must be a whole number from 1 to {MAX_STEPS}", field="steps"
        )
    return steps


def check_shift(shift: float) -> None:
    """Raises `ConfigError` for a shift that is not positive."""
    if not shift > 0:
        raise ConfigError(f"the flow shift is {shift!r}; it must be positive (Sana: 3, at 4K: 6)")


def check_not_done(state: SamplerState) -> None:
    """``step`` after the last one is a mistake of the caller."""
    if state.done:
        raise ValueError(f"all {state.steps} steps were taken already")
