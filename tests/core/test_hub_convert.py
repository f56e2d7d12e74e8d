"""Pickles are opened in one place, and only for tensors."""

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from gesso_core.errors import UnsafeFile, WeightsError
from gesso_core.hub import convert_pickle
from safetensors.torch import load_file


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_state_dict_is_converted(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.randn(3, 2), b=torch.arange(2.0))
    torch.save(state, tmp_path / "model.pth")
    target = tmp_path / "out" / "model.safetensors"
    assert convert_pickle(tmp_path / "model.pth", target) == ["b", "w"]
    converted = load_file(target)
    assert all(torch.equal(converted[key], tensor) for key, tensor in state.items())


def test_the_state_dict_of_a_training_checkpoint_is_taken_out(tmp_path: Path) -> None:
    shared = torch.ones(2)
    checkpoint = {"state_dict": {"a": shared, "tied": shared}, "epoch": 3, "optimizer": {"lr": 1}}
    torch.save(checkpoint, tmp_path / "model.pt")
    keys = convert_pickle(tmp_path / "model.pt", tmp_path / "model.safetensors")
    assert keys == ["a", "tied"]


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Trap(marker)}, tmp_path / "bad.pth")
    with pytest.raises(UnsafeFile, match="holds more than tensors"):
        convert_pickle(tmp_path / "bad.pth", tmp_path / "bad.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "bad.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a state dict"),
        ({}, "expected a state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "entry 'epoch' is a int"),
        ({3: torch.ones(1)}, "entry '3'"),
    ],
    ids=["list", "empty", "mixed", "number as key"],
)
def test_anything_but_a_state_dict_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=message):
        convert_pickle(tmp_path / "model.pth", tmp_path / "model.safetensors")


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        convert_pickle(tmp_path / "none.pth", tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:500])
    with pytest.raises(WeightsError, match="cannot be read"):
        convert_pickle(tmp_path / "cut.pth", tmp_path / "model.safetensors")


def test_the_target_must_be_a_safetensors_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"end with \.safetensors"):
        convert_pickle(tmp_path / "a.pth", tmp_path / "b.pth")
