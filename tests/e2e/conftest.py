"""The whole stack as a user starts it: ``gesso up`` in its own process, with nothing replaced.

Times that a person would wait for (redelivery, scaling) are shortened and a quantized model is
served as well, through the environment, as an operator would do it.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from gesso_core.annotate import fetch
from gesso_core.hub.store import DEFAULT_STORE
from gesso_services.client import Gesso
from small_segmenter import write_segmenter

OPERATOR = {
    "GESSO_DIFFUSION_MODELS": '["sana-tiny", "sana-tiny-int4"]',
    "GESSO_JOB_ACK_WAIT_S": "3",
    "GESSO_DIFFUSION_MAX_REPLICAS": "2",
    "GESSO_DIFFUSION_UPSCALE_DELAY_S": "1",
    "GESSO_DIFFUSION_DOWNSCALE_DELAY_S": "5",
    "GESSO_DIFFUSION_BACKLOG_POLL_S": "0.5",
}
START_S = 180.0


@dataclass
class RunningStack:
    """A started ``gesso up``: its URL, its processes, and what it printed."""

    url: str
    process: psutil.Process
    lines: list[str]

    def client(self, timeout: float = 120.0) -> Gesso:
        return Gesso(self.url, timeout=timeout)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Living descendants whose command line contains every word."""
        found = []
        for child in self.process.children(recursive=True):
            try:
                line = " ".join(child.cmdline())
                if child.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def replicas(self, service: str) -> list[psutil.Process]:
        return self.processes(f"ServeReplica:{service}")

    def broker(self) -> psutil.Process:
        return self.processes("nats-server", "--config")[0]

    def gateway(self) -> psutil.Process:
        return self.processes("gesso_services.gateway.server")[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(check: Callable[[], bool], timeout: float, what: str) -> None:
    """Wait until ``check`` holds; the test fails with ``what`` when it never does."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool], float, str], None]:
    return eventually


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    state, port = tmp_path_factory.mktemp("stack"), free_port()
    with start_stack(state, port, segmenter(state)) as running:
        yield running


def segmenter(place: Path) -> dict[str, str]:
    """The one of ``make models`` where it lies, or else a small one whose masks mean nothing."""
    if all((DEFAULT_STORE / fetch.MODEL / name).is_file() for name in fetch.SHA256):
        return {}
    return {"GESSO_ANNOTATION_FOLDER": str(write_segmenter(place / "segmenter"))}


class start_stack:  # noqa: N801 - reads as a verb where it is used
    """``gesso up`` on ``port`` with its files in ``state``; stopped as Ctrl-C would."""

    def __init__(self, state: Path, port: int, options: Mapping[str, str]) -> None:
        self.command = [sys.executable, "-m", "gesso_services.cli.main", "up"]
        self.command += ["--port", str(port), "--state", str(state)]
        self.url = f"http://127.0.0.1:{port}"
        joined = {"NATS_URL", "RAY_ADDRESS", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
        mine = {k: v for k, v in os.environ.items() if k not in joined}
        self.environment = mine | OPERATOR | dict(options)
        self.lines: list[str] = []

    def __enter__(self) -> RunningStack:
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        deadline = time.monotonic() + START_S
        while not ready.wait(0.2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                pytest.fail("gesso up did not become ready:\n" + "\n".join(self.lines[-30:]))
        return RunningStack(self.url, psutil.Process(self.process.pid), self.lines)

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _read(self, ready: threading.Event) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "READY" in line:
                ready.set()
        self.process.stdout.close()

    def _stop(self) -> None:
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
