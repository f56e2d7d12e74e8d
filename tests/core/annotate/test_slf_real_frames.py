"""SLF on real KITTI frames, which may not be copied: skipped where they are missing."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from gesso_core.annotate.slf.evaluate import main
from gesso_core.annotate.slf.measure import VARIANTS, real_samples, run_variant, summarize
from gesso_core.annotate.slf.prior import load_prior

KITTI = Path(__file__).resolve().parents[4] / "shared" / "data" / "annotation" / "kitti"
pytestmark = [
    pytest.mark.slow,  # as a whole
    pytest.mark.skipif(
        not KITTI.exists(), reason=f"{KITTI} is missing: KITTI frames may not be copied here"
    ),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command prints, and what it writes for the default settings."""
    target, printed = tmp_path_factory.mktemp("slf") / "slf.json", io.StringIO()
    arguments = ["--kitti", str(KITTI), "--frames", "0", "--variant", "mask and LiDAR"]
    with contextlib.redirect_stdout(printed):
        assert main([*arguments, "--json", str(target)]) == 0
    return printed.getvalue(), json.loads(target.read_text())["KITTI frames"]["mask and LiDAR"]


def test_real_cars_are_found_as_well_as_promised(told: tuple[str, dict[str, Any]]) -> None:
    summary, cars = told[1]["summary"], told[1]["cars"]
    assert summary["cars"] == len(cars) == 9
    assert min(summary["recall_bev"][0], summary["recall_3d"][0]) >= 7 / 8
    assert summary["bev_iou"] >= 0.68
    assert summary["iou_3d"] >= 0.62
    assert summary["cpu_seconds"] < 30
    # At 58 m the road lies half a metre below the plane that fits the road near by.
    far = max(cars, key=lambda car: car["depth"])
    assert far["bev_iou"] > 0.5
    assert "few_points" in far["flags"]


def test_every_car_is_printed_and_the_failures_again(told: tuple[str, dict[str, Any]]) -> None:
    assert told[0].count("BEV 0.") >= 9
    assert "failures" in told[0]


def test_without_lidar_the_result_is_visibly_worse() -> None:
    samples, name = real_samples(KITTI, KITTI / "sam_masks"), "mask only"
    outcomes, seconds = run_variant(samples, load_prior(), VARIANTS[name])
    summary, _ = summarize(name, samples, outcomes, seconds, with_ap=False)
    assert summary.bev_iou < 0.6


def test_a_folder_without_cars_is_named(tmp_path, capsys) -> None:
    assert main(["--kitti", str(tmp_path), "--frames", "0"]) == 2
    assert "no KITTI folder" in capsys.readouterr().err
