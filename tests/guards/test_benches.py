"""Benches stay runnable: the same code, tiny, on a CPU; those for a GPU, and those that start
services."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gesso_core.annotate import fetch
from gesso_core.hub.store import DEFAULT_STORE

ROOT = Path(__file__).resolve().parents[2]


def smoke(script: str, *options: str, timeout: float = 240) -> str:
    answer = subprocess.run(
        [sys.executable, ROOT / "bench" / script, "--smoke", *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", ["svdquant_gpu.py", "tune_kernels.py"])
def test_a_gpu_bench_runs_in_its_smoke_form(script: str) -> None:
    shown = smoke(script)
    assert "gemm_w4a4" in shown or '"model": "int8"' in shown


@pytest.mark.slow
def test_the_gpu_bench_of_hart_and_sana_runs_in_its_smoke_form() -> None:
    shown = smoke("autoregressive_gpu.py")
    assert '"model": "sana-tiny"' in shown
    assert '"finite": true' in shown


@pytest.mark.slow
@pytest.mark.parametrize("part", ["caching", "tokens"])
def test_the_autoregressive_bench_runs_in_its_smoke_form(part: str) -> None:
    shown = smoke("autoregressive.py", "--only", part)
    assert '"different_codes": 0' in shown or '"same_tokens": true' in shown


@pytest.mark.slow
@pytest.mark.broker
def test_the_bench_of_the_autoregressive_service_runs_in_its_smoke_form() -> None:
    shown = smoke("autoregressive.py", "--only", "service")
    assert shown.count('"together"') == 4


@pytest.mark.slow
@pytest.mark.ray
def test_the_bench_of_best_of_n_runs_in_its_smoke_form() -> None:
    shown = smoke("best_of_n.py", timeout=280)
    assert shown.count('"api_picks_the_same": "2 of 2"') == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("segmenter", '"prompts": 2'),
        ("text", '"decoder_calls_at_most": 13'),
        ("cars", '"bev_iou"'),
        ("memory", '"annotations"'),
    ],
)
def test_the_bench_of_annotation_runs_in_its_smoke_form(part: str, row: str) -> None:
    if part != "cars" and not (DEFAULT_STORE / fetch.MODEL / fetch.DECODER).is_file():
        pytest.skip(f"{DEFAULT_STORE} lacks {fetch.MODEL}; run `make models`")
    assert row in smoke("annotation.py", "--only", part)
