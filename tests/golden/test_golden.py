"""Replay golden cases: numbers made by the original implementations, case by case."""

from collections.abc import Callable
from pathlib import Path

import adapters_annotation_masks
import adapters_char_sam
import adapters_dc_ae
import adapters_hart
import adapters_hart_tokenizer
import adapters_kitti
import adapters_samplers
import adapters_sana
import adapters_svdquant_formats
import adapters_svdquant_numerics
import adapters_text
import adapters_vila_u
import adapters_vila_u_tower
import pytest
import torch
from golden_case import Adapter, Case, load_case
from torch import Tensor

ADAPTERS: dict[tuple[str, str], Adapter] = {
    **adapters_annotation_masks.ADAPTERS,
    **adapters_char_sam.ADAPTERS,
    **adapters_dc_ae.ADAPTERS,
    **adapters_hart.ADAPTERS,
    **adapters_sana.ADAPTERS,
    **adapters_samplers.ADAPTERS,
    **adapters_svdquant_formats.ADAPTERS,
    **adapters_svdquant_numerics.ADAPTERS,
    **adapters_text.ADAPTERS,
    **adapters_vila_u.ADAPTERS,
    **adapters_vila_u_tower.ADAPTERS,
    **adapters_hart_tokenizer.ADAPTERS,
    **adapters_kitti.ADAPTERS,
}
# Kinds whose cases state another rule than "floats within a tolerance".
COMPARISONS: dict[tuple[str, str], Callable[[str, Tensor, Tensor, Case], None]] = {
    **adapters_svdquant_formats.COMPARE,
    **adapters_svdquant_numerics.COMPARE,
}


def compare(name: str, got: Tensor, want: Tensor, case: Case) -> None:
    """Floats within the case's tolerance, everything else exactly."""
    if not want.is_floating_point():
        torch.testing.assert_close(got.to(want.dtype), want, atol=0, rtol=0, msg=name_first(name))
        return
    bound = case.meta["tolerances"]["float"]
    torch.testing.assert_close(
        got.to(want.dtype), want, atol=bound["atol"], rtol=bound["rtol"], msg=name_first(name)
    )


def name_first(name: str):
    return lambda message: f"output.{name}: {message}"


def test_golden_case_is_reproduced(golden_folder: Path) -> None:
    case = load_case(golden_folder)
    if case.key not in ADAPTERS:
        pytest.fail(f"no adapter for kind {case.key}: add one to tests/golden/adapters_*.py")
    with torch.no_grad():
        produced = ADAPTERS[case.key](case)
    assert set(produced) == set(case.outputs), "an adapter returns every output of its case"
    check = COMPARISONS.get(case.key, compare)
    for name, want in case.outputs.items():
        check(name, produced[name], want, case)


def test_a_wrong_number_is_noticed(tmp_path: Path) -> None:
    want = torch.ones(3)
    case = Case(tmp_path, {"tolerances": {"float": {"atol": 1e-5, "rtol": 0.0}}}, {}, {}, {})
    with pytest.raises(AssertionError, match=r"output\.y"):
        compare("y", want + 1e-3, want, case)
