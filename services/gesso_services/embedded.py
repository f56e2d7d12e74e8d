"""The whole of gesso in one terminal: a real broker, a local Ray, every service, and the gateway.

With ``NATS_URL`` or ``RAY_ADDRESS`` in the environment it joins what exists instead of starting its
own. Nothing is different inside: the services are those of ``serve_config.yaml``.

    with Stack(report=print) as stack:
        stack.wait()                    # until Ctrl-C
"""

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from gesso_core.errors import ConfigError, GessoError, Unavailable
from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from gesso_services.client import Gesso, NotReachable
from gesso_services.embedded_ray import LocalRay
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.provision import provision

LOOK_AGAIN_S = 0.25
SUPERVISE_S = 1.0
GATEWAY_GRACE_S = 8.0

Report = Callable[[str, str], None]
"""Told (part, what it does now); parts are ``broker``, ``ray``, the services and ``gateway``."""


class StackSettings(BaseSettings):
    """Where to keep things and what to join; times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="GESSO_", frozen=True, populate_by_name=True, extra="ignore"
    )

    nats_url: str | None = Field(
        default=None, validation_alias=AliasChoices("NATS_URL", "nats_url")
    )
    ray_address: str | None = Field(
        default=None, validation_alias=AliasChoices("RAY_ADDRESS", "ray_address")
    )
    state_dir: Path = Path.home() / ".local" / "state" / "gesso"
    ray_cpus: int = Field(default=8, ge=1, description="what Ray may hand out, not what there is")
    object_store_bytes: int = Field(default=80 * 2**20, ge=75 * 2**20)
    start_timeout_s: float = Field(default=300.0, gt=0)


class Stack:
    """Everything that ``gesso up`` starts; a context manager that stops it in reverse order."""

    def __init__(
        self,
        settings: StackSettings | None = None,
        gateway: GatewaySettings | None = None,
        *,
        report: Report = lambda part, state: None,
    ) -> None:
        self.settings = settings or StackSettings()
        self.gateway_settings = gateway or GatewaySettings()
        self.report = report
        self._to_stop = ExitStack()
        self._broker: NatsServer | None = None
        self._gateway: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        host = self.gateway_settings.host
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return f"http://{shown}:{self.gateway_settings.port}"

    def __enter__(self) -> Self:
        """Start everything and return when a real warm-up has gone through all of it."""
        try:
            self._start()
        except BaseException:
            self._to_stop.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._to_stop.close()

    def wait(self) -> None:
        """Watch over the broker and the gateway, and start again what has died; for ever."""
        while True:
            time.sleep(SUPERVISE_S)
            if self._broker is not None and not self._broker.is_running:
                self.report("broker", "died; starting it again")
                self._broker.start()
            if self._gateway is not None and self._gateway.poll() is not None:
                self.report(
                    "gateway", f"ended with code {self._gateway.returncode}; starting again"
                )
                self._gateway = self._spawn_gateway()

    def _start(self) -> None:
        refuse_busy_port(self.gateway_settings.host, self.gateway_settings.port)
        if self.settings.nats_url is None:
            self._start_broker()
        asyncio.run(self._provision())
        self._start_gateway()
        ray = LocalRay(
            address=self.settings.ray_address,
            cpus=self.settings.ray_cpus,
            object_store_bytes=self.settings.object_store_bytes,
            report=self.report,
        )
        self._to_stop.callback(ray.stop)
        ray.start()
        ray.deploy(timeout_s=self.settings.start_timeout_s, meanwhile=self._gateway_must_live)
        self._wait_for_gateway()

    def _start_broker(self) -> None:
        self.report("broker", "starting")
        store = self.settings.state_dir / "nats"
        store.mkdir(parents=True, exist_ok=True)
        self._to_stop.enter_context(_only_one(store / "lock"))
        self._broker = NatsServer(store)
        self._broker.start()
        self._to_stop.callback(self._stop, "broker", self._broker.stop)
        # Ray's processes and the gateway inherit where the broker is and how to log in.
        os.environ.update(self._broker.environment())
        self._to_stop.callback(_forget, list(self._broker.environment()))
        self.report("broker", f"ready at {self._broker.url}, files in {store}")

    async def _provision(self) -> None:
        bus = await Bus.connect("admin")
        try:
            await provision(bus)
        finally:
            await bus.close()

    def _start_gateway(self) -> None:
        self.report("gateway", "starting")
        self._gateway = self._spawn_gateway()
        self._to_stop.callback(self._stop, "gateway", self._stop_gateway)

    def _spawn_gateway(self) -> "subprocess.Popen[bytes]":
        settings = self.gateway_settings
        place = {"GESSO_GATEWAY_HOST": settings.host, "GESSO_GATEWAY_PORT": str(settings.port)}
        return subprocess.Popen(
            [sys.executable, "-m", "gesso_services.gateway.server"],
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for us, and we stop it in order
        )

    def _gateway_must_live(self) -> None:
        if self._gateway is not None and self._gateway.poll() is not None:
            raise Unavailable(
                f"the gateway ended with code {self._gateway.returncode} while the services "
                "started; what it printed above says why"
            )

    def _wait_for_gateway(self) -> None:
        deadline = time.monotonic() + self.settings.start_timeout_s
        with Gesso(self.url, timeout=10.0) as gesso:
            while not is_ready(gesso):
                self._gateway_must_live()
                if time.monotonic() > deadline:
                    raise Unavailable(f"the gateway at {self.url} did not become ready in time")
                time.sleep(LOOK_AGAIN_S)
        self.report("gateway", f"ready at {self.url}")

    def _stop_gateway(self) -> None:
        if self._gateway is None:
            return
        self._gateway.terminate()
        try:
            self._gateway.wait(GATEWAY_GRACE_S)
        except subprocess.TimeoutExpired:
            self._gateway.kill()
            self._gateway.wait()

    def _stop(self, part: str, stop: Callable[[], None]) -> None:
        self.report(part, "stopping")
        stop()
        self.report(part, "stopped")


def is_ready(gesso: Gesso) -> bool:
    """Does a gateway answer there, and is it ready?"""
    try:
        return bool(gesso.ready()["ready"])
    except (NotReachable, GessoError):
        return False


def refuse_busy_port(host: str, port: int) -> None:
    """``ConfigError`` when something listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be taken ({error.strerror}); is `gesso up` running already? "
                "Stop what listens there, or choose another port with --port or GESSO_GATEWAY_PORT"
            ) from error


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """A lock on a file for as long as the context lasts: one broker per folder."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another broker uses {path.parent}; stop the other `gesso up`, or give this one "
                "a folder of its own with --state or GESSO_STATE_DIR"
            ) from error
        yield


def _forget(names: list[str]) -> None:
    for name in names:
        os.environ.pop(name, None)
