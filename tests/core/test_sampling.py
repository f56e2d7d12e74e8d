"""Samplers, guidance, noise and sizes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.sampling import (
    SAMPLERS,
    SCM,
    FlowDPMSolver,
    FlowEuler,
    Sampler,
    SamplerState,
    make_sampler,
)
from gesso_core.sampling.guidance import classifier_free, is_guided
from gesso_core.sampling.noise import initial_noise, noise_stream
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
SHAPE = (3, 4, 4)


def wavy(latent: Tensor, time: float) -> Tensor:
    """A stand-in for the network."""
    return 0.3 * latent + torch.sin(torch.tensor(time / 1000))


def drawn(sampler: Sampler, steps: int, velocity: Velocity = wavy, seed: int = 0) -> Tensor:
    noises = noise_stream(seed, SHAPE)
    state = sampler.start(next(noises), steps)
    while not state.done:
        noise = next(noises) if sampler.stochastic else None
        state = sampler.step(state, velocity(*sampler.model_input(state)), noise)
    return state.result


@pytest.fixture(scope="module")
def schedulers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    return DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler


def peer_trajectory(scheduler: Any, steps: int) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    latent, trajectory = initial_noise(0, SHAPE), []
    for time in scheduler.timesteps:
        latent = scheduler.step(wavy(latent, float(time)), time, latent).prev_sample
        trajectory.append(latent)
    return trajectory


def our_trajectory(sampler: Sampler, steps: int) -> list[SamplerState]:
    states = [sampler.start(initial_noise(0, SHAPE), steps)]
    while not states[-1].done:
        latent, time = sampler.model_input(states[-1])
        states.append(sampler.step(states[-1], wavy(latent, time)))
    return states


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20, 37])
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_flow_dpm_solver_walks_like_diffusers(schedulers: Any, steps: int, shift: float) -> None:
    peer = schedulers[0](use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    want, states = peer_trajectory(peer, steps), our_trajectory(FlowDPMSolver(shift), steps)
    assert list(states[0].timesteps) == peer.timesteps.tolist()
    assert list(states[0].levels) == peer.sigmas.tolist()
    for state, latent in zip(states[1:], want, strict=True):
        torch.testing.assert_close(state.latent, latent, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_flow_euler_walks_like_diffusers(schedulers: Any, steps: int, shift: float) -> None:
    peer = schedulers[1](shift=shift)
    want, states = peer_trajectory(peer, steps), our_trajectory(FlowEuler(shift), steps)
    torch.testing.assert_close(torch.tensor(states[0].timesteps), peer.timesteps)
    for state, latent in zip(states[1:], want, strict=True):
        torch.testing.assert_close(state.latent, latent, atol=2e-5, rtol=1e-4)


def test_a_single_shift_ends_closer_to_the_data() -> None:
    noise = torch.zeros(SHAPE)
    double = FlowEuler(3.0).start(noise, 20).levels
    single = FlowEuler(3.0, compat="single_shift").start(noise, 20).levels
    assert double[-2] == pytest.approx(0.00893, abs=1e-5)
    assert single[-2] == pytest.approx(0.00299, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_picture_leads_every_sampler_to_it(name: str, steps: int) -> None:
    picture, sampler = initial_noise(9, SHAPE), make_sampler(name, 3.0)
    noises = noise_stream(0, SHAPE)
    state = sampler.start(next(noises), steps)
    while not state.done:
        latent, time = sampler.model_input(state)
        level = time if name == "scm" else state.levels[state.index]
        velocity = (latent - picture) / level
        torch.testing.assert_close(sampler.denoised(state, velocity), picture, atol=1e-4, rtol=1e-4)
        state = sampler.step(state, velocity, next(noises))
    torch.testing.assert_close(state.result, picture, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_goes_its_way_whatever_its_neighbours_do(name: str) -> None:
    sampler = make_sampler(name, 3.0)
    plans = [(3, 4), (4, 7), (5, 2)]  # seed, steps
    streams = [noise_stream(seed, SHAPE) for seed, _ in plans]
    states = [
        sampler.start(next(stream), steps)
        for stream, (_, steps) in zip(streams, plans, strict=True)
    ]
    while not all(state.done for state in states):
        active = [i for i, state in enumerate(states) if not state.done]
        inputs = [sampler.model_input(states[i]) for i in active]
        outputs = torch.stack([wavy(latent, time) for latent, time in inputs])
        for i, output in zip(active, outputs, strict=True):
            noise = next(streams[i]) if sampler.stochastic else None
            states[i] = sampler.step(states[i], output, noise)
    for state, (seed, steps) in zip(states, plans, strict=True):
        assert torch.equal(state.result, drawn(sampler, steps, seed=seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_leaves_its_state_as_it_was(name: str) -> None:
    sampler = make_sampler(name, 3.0)
    state = sampler.start(initial_noise(0, SHAPE), 3)
    before = state.latent.clone()
    velocity, noise = torch.ones(SHAPE), initial_noise(1, SHAPE)
    once, again = sampler.step(state, velocity, noise), sampler.step(state, velocity, noise)
    assert torch.equal(state.latent, before)
    assert torch.equal(once.latent, again.latent)


def test_latents_stay_in_fp32_under_a_half_precision_network() -> None:
    for name in SAMPLERS:
        result = drawn(make_sampler(name, 3.0), 3, lambda x, t: wavy(x, t).bfloat16())
        assert result.dtype == torch.float32


def test_the_first_times_of_the_solver_are_truncated() -> None:
    times = FlowDPMSolver(3.0).start(torch.zeros(SHAPE), 20).timesteps
    assert times[:4] == (999.0, 982.0, 963.0, 944.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_scm_takes_any_number_of_steps(steps: int) -> None:
    state = SCM().start(torch.zeros(SHAPE), steps)
    assert len(state.levels) == steps + 1
    assert state.levels[0] == pytest.approx(1.5708, abs=1e-6)
    assert state.levels[-1] == 0
    assert all(0 <= time <= 1.00001 for time in state.timesteps)


def test_scm_asks_for_the_noise_it_needs() -> None:
    state = SCM().start(torch.zeros(SHAPE), 2)
    with pytest.raises(ValueError, match="pass noise"):
        SCM().step(state, torch.zeros(SHAPE))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, True], ids=str)
def test_an_impossible_number_of_steps_is_refused(name: str, steps: Any) -> None:
    with pytest.raises(InvalidRequest, match="from 1 to 1000") as refusal:
        make_sampler(name, 3.0).start(torch.zeros(SHAPE), steps)
    assert refusal.value.field == "steps"


def test_unfinished_and_finished_states_are_told_apart() -> None:
    sampler = FlowEuler()
    state = sampler.start(torch.zeros(SHAPE), 1)
    with pytest.raises(ValueError, match="0 of 1"):
        _ = state.result
    done = sampler.step(state, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="all 1 steps"):
        sampler.step(done, torch.zeros(SHAPE))


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="flow-dpm-solver, flow-euler, scm"):
        make_sampler("ddim", 3.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlowEuler(0.0),
        lambda: FlowDPMSolver(-1.0),
        lambda: FlowDPMSolver(3.0, order=3),
        lambda: FlowEuler(3.0, compat="other"),  # type: ignore[arg-type]
        lambda: SCM(sigma_data=0.0),
        lambda: SCM(max_angle=3.0),
        lambda: SCM(middle_angle=2.0),
    ],
)
def test_a_sampler_that_makes_no_sense_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        build()


def test_guidance_goes_beyond_the_prompt_in_fp32() -> None:
    negative = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)
    positive = torch.tensor([[2.0], [1.0]], dtype=torch.bfloat16)
    guided = classifier_free(negative, positive, torch.tensor([[3.0], [4.5]]))
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, torch.tensor([[4.0], [-2.5]]))


def test_guidance_keeps_to_its_interval() -> None:
    assert is_guided(500, 4.5)
    assert not is_guided(500, 1.0)
    assert not is_guided(500, 4.5, interval=(600, 900))
    assert is_guided(600, 4.5, interval=(600, 900))


def test_the_initial_noise_is_the_first_draw_of_a_generator_of_its_own() -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    stream = noise_stream(7, SHAPE)
    assert torch.equal(next(stream), first)
    assert torch.equal(next(stream), second)
    assert torch.equal(initial_noise(7, SHAPE), first)


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initial_noise(123, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True], ids=str)
def test_an_impossible_seed_is_refused(seed: Any) -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        initial_noise(seed, SHAPE)


def test_the_largest_seed_is_good() -> None:
    assert initial_noise(2**63 - 1, SHAPE).isfinite().all()
