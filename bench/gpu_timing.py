"""Timing on a GPU for the benches beside this file, and what the machine can do at best.

Times are medians of `triton.testing.do_bench` (L2 flushed before every run) and of CUDA-graph
replays, which leave the launches of the host out. With ``--smoke`` the same code runs on a CPU with
tiny shapes: that tests the harness and measures nothing.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
WARMUP_MS, REPEAT_MS, GRAPH_REPEAT_MS = 25, 100, 40


@dataclass(frozen=True)
class Bench:
    """Where to run, and whether it is the real thing."""

    device: str
    dtype: torch.dtype
    smoke: bool

    def microseconds(self, run: Run, repeat_ms: int = REPEAT_MS) -> float:
        """Median of one call, as a host launches it, over ``repeat_ms``."""
        if self.smoke:
            return _wall(run)
        from triton.testing import do_bench

        warmup = repeat_ms * WARMUP_MS // REPEAT_MS
        return 1e3 * float(do_bench(run, warmup=warmup, rep=repeat_ms, return_mode="median"))

    def graph_microseconds(self, run: Run) -> float:
        """Median of one call inside a CUDA graph."""
        if self.smoke:
            return _wall(run)
        from triton.testing import do_bench_cudagraph

        return 1e3 * float(do_bench_cudagraph(run, rep=GRAPH_REPEAT_MS, return_mode="median"))

    def about(self) -> dict[str, Any]:
        """Hardware, versions and date, for the record."""
        name = platform.processor() if self.smoke else torch.cuda.get_device_name()
        return {
            "device": name,
            "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "smoke": self.smoke,
        }

    def ceilings(self) -> dict[str, float]:
        """Measured now: bf16 and int8 products, and a copy. Random operands keep clocks honest."""
        side = 128 if self.smoke else 8192
        a = torch.randn(side, side, device=self.device).to(self.dtype)
        integers = torch.randint(-127, 128, (side, side), device=self.device, dtype=torch.int8)
        columns = integers.T.contiguous().T
        operations = 2 * side**3
        return {
            "matmul_16bit_tflops": operations / self.microseconds(lambda: a @ a) / 1e6,
            "matmul_int8_tops": operations
            / self.microseconds(lambda: torch._int_mm(integers, columns))
            / 1e6,
            "copy_tb_per_s": 2 * a.nbytes / self.microseconds(a.clone) / 1e6,
        }


def bench_of(smoke: bool) -> Bench:
    """The GPU, or with ``smoke`` the CPU; exits where there is no GPU."""
    if smoke:
        return Bench("cpu", torch.float32, True)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --smoke runs the same code on a CPU with tiny shapes")
    return Bench("cuda", torch.bfloat16, False)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float((got.float() - exact).norm() / exact.norm())


def _wall(run: Run) -> float:
    started = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - started)
