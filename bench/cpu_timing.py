"""Alternating timings for the benches on a CPU, and where they were taken."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """Medians over the repetitions, in milliseconds; CPU time is that of all threads."""

    cpu_ms: float
    wall_ms: float

    def row(self) -> Row:
        return {"cpu_ms": round(self.cpu_ms, 3), "wall_ms": round(self.wall_ms, 3)}


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Time of each run, after one unmeasured round; a busy machine is busy for all of them."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            if number:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: Times(*(1e3 * statistics.median(column) for column in zip(*times, strict=True)))
        for name, times in taken.items()
    }


def compared(times: dict[str, Times], slow: str, fast: str, target: float) -> Row:
    """Both times, and how many times faster the second is; the ratio is that of CPU time."""
    ratio = times[slow].cpu_ms / times[fast].cpu_ms
    return {
        slow: times[slow].row(),
        fast: times[fast].row(),
        "ratio": round(ratio, 2),
        "wall_ratio": round(times[slow].wall_ms / times[fast].wall_ms, 2),
        "target": target,
        "met": ratio >= target,
    }


def about(smoke: bool) -> Row:
    """Hardware, versions, date, and how busy the machine was before."""
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average_before": round(os.getloadavg()[0], 2),
        "smoke": smoke,
        "measured": date.today().isoformat(),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def name_or_path(text: str) -> str | Path:
    """A registry name, or a folder when there is one at this path."""
    return Path(text) if Path(text).is_dir() else text
