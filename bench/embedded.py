"""The whole stack on one machine: how long a small-model picture takes, and what all of it weighs.

Starts ``gesso up`` as a user would, waits until ``/health/ready``, asks for pictures over HTTP one
after the other, and adds up the proportional set size (PSS) of every process that belongs to it.

    python bench/embedded.py          → bench/results/embedded.json
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "embedded.json"
TARGETS = {"picture_p50_s": 1.5, "pss_gb": 3.5}
MARK = "GESSO_BENCH_MARK"
READY_WITHIN_S = 300.0


@contextlib.contextmanager
def stack(mark: str, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """``gesso up`` with a port and a state of its own; every process under it carries ``mark``."""
    command = [str(Path(sys.executable).with_name("gesso")), "up", "--port", str(port)]
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [*command, "--state", state],
            env={**os.environ, MARK: mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def until_ready(process: "subprocess.Popen[bytes]", url: str) -> float:
    """Seconds until a real picture has gone through every service."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < READY_WITHIN_S:
        if process.poll() is not None:
            raise SystemExit(f"gesso up ended with {process.returncode} before it was ready")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{url}/health/ready", timeout=10) as answer,
        ):
            if answer.status == 200:
                return time.perf_counter() - begun
        time.sleep(0.5)
    raise SystemExit(f"not ready within {READY_WITHIN_S:g} s")


def picture(url: str, seed: int) -> float:
    """Seconds from asking to having the picture."""
    wish = {"prompt": "a red apple, 3D style, on a blue background", "seed": seed}
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        data=json.dumps(wish).encode(),
        headers={"Content-Type": "application/json"},
    )
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["data"][0]["b64_json"]
    return time.perf_counter() - begun


def memory_by_process(mark: str) -> dict[str, int]:
    """PSS in bytes of every process that carries ``mark`` in its environment, by what it runs."""
    wanted, total = f"{MARK}={mark}".encode(), dict[str, int]()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                name = _name((folder / "cmdline").read_bytes())
                total[name] = total.get(name, 0) + _pss(folder)
    return total


def _pss(folder: Path) -> int:
    lines = (folder / "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def _name(command_line: bytes) -> str:
    """``ray::autoencoder``, ``nats-server``, ``python -m gesso_services.gateway`` and the like."""
    words = [word for word in command_line.decode(errors="replace").split("\0") if word]
    shown = [Path(word).name for word in words[:3] if not word.startswith("--")]
    return " ".join(shown)[:60] or "?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), "unknown")


def measure(pictures: int) -> dict[str, Any]:
    mark, port = uuid.uuid4().hex, free_port()
    url = f"http://127.0.0.1:{port}"
    with stack(mark, port) as process:
        ready_s = until_ready(process, url)
        load = os.getloadavg()[0]
        first_s = picture(url, seed=0)
        times = [picture(url, seed) for seed in range(1, pictures + 1)]
        memory = memory_by_process(mark)
    return {
        "case": "embedded/sana-tiny",
        "device": processor(),
        "cores": os.cpu_count(),
        "load_average": round(load, 2),
        "ready_s": round(ready_s, 1),
        "first_picture_s": round(first_s, 3),
        "picture_p50_s": round(statistics.median(times), 3),
        "picture_max_s": round(max(times), 3),
        "pss_gb": round(sum(memory.values()) / 1e9, 3),
        "pss_mb_by_process": {
            name: round(size / 1e6) for name, size in sorted(memory.items(), key=lambda x: -x[1])
        },
        "targets": TARGETS,
        "measured": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    row = measure(arguments.pictures)
    print(f"ready after {row['ready_s']} s on {row['device']}, load {row['load_average']}")
    for name, target in TARGETS.items():
        print(f"  {name:14} {row[name]:8.3f}   target {target:g}")
    for name, size in row["pss_mb_by_process"].items():
        print(f"    {size:6} MB  {name}")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
