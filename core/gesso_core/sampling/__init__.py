"""Samplers, guidance, noise and sizes: pure functions and immutable objects on tensors."""

from collections.abc import Callable

from gesso_core.errors import InvalidRequest
from gesso_core.sampling.flow_dpm_solver import FlowDPMSolver
from gesso_core.sampling.flow_euler import FlowEuler
from gesso_core.sampling.scm import SCM
from gesso_core.sampling.state import Sampler, SamplerState

__all__ = [
    "SAMPLERS",
    "SCM",
    "FlowDPMSolver",
    "FlowEuler",
    "Sampler",
    "SamplerState",
    "make_sampler",
]

# Name → sampler for a model's flow shift.
SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "flow-dpm-solver": FlowDPMSolver,
    "flow-euler": FlowEuler,
    "scm": lambda shift: SCM(),
}


def make_sampler(name: str, shift: float) -> Sampler:
    """The sampler of that name for a model's flow shift (which SCM has no use for).

    Raises:
        InvalidRequest: unknown name; the message lists the known ones.
    """
    if name not in SAMPLERS:
        raise InvalidRequest(
            f"unknown sampler {name!r}; available: {', '.join(sorted(SAMPLERS))}", field="sampler"
        )
    return SAMPLERS[name](shift)
