"""The state of a training run on disk: killed at any moment, it continues where it was last saved.

One safetensors file holds parameters, their average, the optimizer's moments and the random
generator; counters and the log are in its metadata. No pickle.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from gesso_core.train.optimizers import descend
from gesso_core.train.schedule import Clock, Ema


@dataclass
class RunState:
    """Everything that changes during a run."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    ema: Ema
    generator: Generator
    clock: Clock
    step: int = 0
    samples: int = 0
    stage: str = "start"
    losses: list[tuple[int, float]] = field(default_factory=list)

    def update(self, loss: Tensor, samples: int) -> float:
        """One step of the optimizers down ``loss``, which counts ``samples``; the loss."""
        value = descend(loss, self.model, self.optimizers)
        self.ema.update(self.model)
        self.step += 1
        self.samples += samples
        return value

    def save(self, path: Path) -> None:
        """Write the state; the old file is replaced only when the new one is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()}
        tensors |= _moments(self.optimizers)
        tensors["generator"] = self.generator.get_state()
        counters = {
            "step": self.step, "samples": self.samples, "stage": self.stage,
            "used_s": self.clock.used_s, "ema_steps": self.ema.steps, "losses": self.losses,
        }  # fmt: skip
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        temporary = path.with_suffix(".partial")
        save_file(contiguous, temporary, metadata={"counters": json.dumps(counters)})
        os.replace(temporary, path)

    def resume(self, path: Path) -> bool:
        """Read the state when there is one; returns whether there was."""
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            counters: dict[str, Any] = json.loads(file.metadata()["counters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.model.load_state_dict(_part(tensors, "model."))
        self.ema.shadow = {
            k: v.to(self.ema.shadow[k].device) for k, v in _part(tensors, "ema.").items()
        }
        self.ema.steps = counters["ema_steps"]
        for number, optimizer in enumerate(self.optimizers):
            _load_moments(optimizer, _part(tensors, f"optimizer.{number}."))
        self.generator.set_state(tensors["generator"])
        self.clock = Clock(self.clock.budget_s, counters["used_s"])
        self.step, self.samples = counters["step"], counters["samples"]
        self.stage = counters["stage"]
        self.losses = [(int(step), float(loss)) for step, loss in counters["losses"]]
        return True


def load_averaged(model: nn.Module, path: Path) -> None:
    """Fill ``model`` with the averaged parameters of a saved run."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("ema.")]  # noqa: SIM118
        averaged = {name.removeprefix("ema."): file.get_tensor(name) for name in names}
    model.load_state_dict(averaged)


def read_counters(path: Path) -> dict[str, Any]:
    """Steps, samples, seconds and losses of a saved run."""
    with safe_open(path, framework="pt") as file:
        counters: dict[str, Any] = json.loads(file.metadata()["counters"])
        return counters


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _moments(optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[str, Tensor]:
    return {
        f"optimizer.{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
