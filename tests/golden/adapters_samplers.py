"""Adapters of the sampler cases: schedules, trajectories and sizes."""

import re
from collections.abc import Callable

import torch
from gesso_core.sampling import SCM, FlowDPMSolver, FlowEuler, Sampler
from gesso_core.sampling.aspect_ratio import aspect_table, bin_for, resize_and_crop
from golden_case import Adapter, Case
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


FORMULA = re.compile(
    r"=\s*(?P<gain>-?[\d.]+)\*\w+\s*(?P<sign>[+-])\s*(?:(?P<amplitude>[\d.]+)\*)?"
    r"(?P<wave>sin|cos)\(\w+(?:/(?P<unit>[\d.]+))?\)"
)


def velocity_of(case: Case) -> Velocity:
    """The stand-in for the network that the case declares, e.g. ``0.3*x + sin(ts/1000)``."""
    found = FORMULA.search(case.meta["model_function"])
    assert found, f"a model function that this adapter cannot read: {case.meta['model_function']}"
    gain, unit = float(found["gain"]), float(found["unit"] or 1)
    amplitude = float(found["sign"] + (found["amplitude"] or "1"))
    wave = torch.sin if found["wave"] == "sin" else torch.cos
    return lambda x, time: gain * x + amplitude * wave(torch.tensor(time / unit))


def steps_of(case: Case) -> int:
    return int(case.meta["set_timesteps"]["num_inference_steps"])


def flow(case: Case, sampler: Sampler) -> dict[str, Tensor]:
    """Walk the whole schedule of a flow sampler."""
    velocity = velocity_of(case)
    state = sampler.start(case.inputs["x_init"], steps_of(case))
    trajectory = []
    while not state.done:
        state = sampler.step(state, velocity(*sampler.model_input(state)))
        trajectory.append(state.latent)
    return {
        "sigmas": torch.tensor(state.levels),
        "timesteps": torch.tensor(state.timesteps),
        "trajectory": torch.stack(trajectory),
        "final": state.result,
    }


def flow_dpm_solver(case: Case) -> dict[str, Tensor]:
    options = case.meta["constructor"]
    assert options.get("solver_type", "midpoint") == "midpoint"
    assert options.get("final_sigmas_type", "zero") == "zero"
    return flow(case, FlowDPMSolver(options["flow_shift"], order=options.get("solver_order", 2)))


def flow_euler(case: Case) -> dict[str, Tensor]:
    return flow(case, FlowEuler(case.meta["constructor"].get("shift", 1.0)))


def scm(case: Case) -> dict[str, Tensor]:
    grid = case.meta["set_timesteps"]
    sampler = SCM(
        sigma_data=case.meta["constructor"].get("sigma_data", 0.5),
        max_angle=grid["max_timesteps"],
        middle_angle=grid["intermediate_timesteps"],
    )
    velocity = velocity_of(case)
    state = sampler.start(case.inputs["x_init"], steps_of(case))
    angles, times = state.levels, state.timesteps
    inputs, clean, trajectory = [], [], []
    for noise in case.inputs["noise"]:
        latent, time = sampler.model_input(state)
        output = velocity(latent, time)
        inputs.append(latent)
        clean.append(sampler.denoised(state, output) * sampler.sigma_data)
        state = sampler.step(state, output, noise)
        trajectory.append(state.latent)
    return {
        "timesteps": torch.tensor(angles),
        "flow_time": torch.tensor(times),
        "model_input": torch.stack(inputs),
        "denoised": torch.stack(clean),
        "trajectory": torch.stack(trajectory),
        "final_latent": state.result,
    }


def resolution_binning(case: Case) -> dict[str, Tensor]:
    """The first three columns of ``bins`` are the question: table, height, width."""
    produced = {}
    for name, want in case.outputs.items():
        if name == "bins":
            rows = [
                [base, height, width, *bin_for(height, width, aspect_table(base))]
                for base, height, width, *_ in want.tolist()
            ]
            produced[name] = torch.tensor(rows)
        else:
            size = re.fullmatch(r"crop_(\d+)x(\d+)", name)
            assert size, f"an output that this adapter does not know: {name}"
            produced[name] = resize_and_crop(case.inputs["image"], int(size[1]), int(size[2]))
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("samplers", "flow_dpm_solver"): flow_dpm_solver,
    ("samplers", "flow_euler"): flow_euler,
    ("samplers", "scm"): scm,
    ("samplers", "resolution_binning"): resolution_binning,
}
