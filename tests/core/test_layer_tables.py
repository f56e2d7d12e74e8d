"""First values of learned tables."""

from typing import Any

import pytest
import torch
from gesso_core.layers.tables import normal_table
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_table_is_drawn_with_its_scale() -> None:
    torch.manual_seed(0)
    table = normal_table(64, 256, scale=0.25)
    assert table.requires_grad
    assert float(table.detach().std()) == pytest.approx(0.25, rel=0.02)


def test_nothing_is_computed_on_the_meta_device() -> None:
    with torch.device("meta"), Calls() as calls:
        assert normal_table(6, 32, scale=0.5).shape == (6, 32)
    assert not [name for name in calls.names if "mul" in name or "div" in name]
    with Calls() as calls:
        normal_table(6, 32, scale=0.5)
    assert [name for name in calls.names if "mul" in name]
