"""SLF on real KITTI frames, which may not be copied: skipped where they are missing."""

from pathlib import Path

import pytest
import torch
from gesso_core.annotate.slf.evaluate import main
from gesso_core.annotate.slf.measure import (
    VARIANTS,
    CarScore,
    Sample,
    Summary,
    real_samples,
    run_variant,
    summarize,
)
from gesso_core.annotate.slf.prior import load_prior

KITTI = Path(__file__).resolve().parents[4] / "shared" / "data" / "annotation" / "kitti"
pytestmark = pytest.mark.skipif(
    not KITTI.exists(), reason=f"{KITTI} is missing: KITTI frames may not be copied here"
)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    torch.set_num_threads(1)
    return real_samples(KITTI, KITTI / "sam_masks")


def measured(samples: list[Sample], name: str) -> tuple[Summary, list[CarScore]]:
    outcomes, seconds = run_variant(samples, load_prior(), VARIANTS[name])
    return summarize(name, samples, outcomes, seconds, with_ap=False)


def test_real_cars_are_found_as_well_as_promised(samples: list[Sample]) -> None:
    summary, cars = measured(samples, "mask and LiDAR")
    assert summary.cars == len(cars) == 9
    assert min(summary.recall_bev[0], summary.recall_3d[0]) >= 7 / 8
    assert summary.bev_iou >= 0.68
    assert summary.iou_3d >= 0.62
    assert summary.cpu_seconds < 30
    # At 58 m the road lies half a metre below the plane that fits the road near by.
    far = max(cars, key=lambda car: car.depth)
    assert far.bev_iou > 0.5
    assert "few_points" in far.flags


def test_without_lidar_the_result_is_visibly_worse(samples: list[Sample]) -> None:
    assert measured(samples, "mask only")[0].bev_iou < 0.6


def test_the_command_prints_every_car_and_writes_json(tmp_path, capsys) -> None:
    target = tmp_path / "slf.json"
    arguments = ["--kitti", str(KITTI), "--frames", "0", "--variant", "mask and LiDAR"]
    assert main([*arguments, "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("BEV 0.") >= 9
    assert "failures" in printed
    assert '"KITTI frames"' in target.read_text()


def test_a_folder_without_cars_is_named(tmp_path, capsys) -> None:
    assert main(["--kitti", str(tmp_path), "--frames", "0"]) == 2
    assert "no KITTI folder" in capsys.readouterr().err
