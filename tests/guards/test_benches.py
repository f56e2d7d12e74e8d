"""The GPU benches stay runnable: the same code, tiny, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["svdquant_gpu.py", "tune_kernels.py"])
def test_a_gpu_bench_runs_in_its_smoke_form(script: str) -> None:
    answer = subprocess.run(
        [sys.executable, ROOT / "bench" / script, "--smoke"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "gemm_w4a4" in answer.stdout or '"model": "int8"' in answer.stdout
