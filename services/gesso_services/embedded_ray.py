"""A Ray on this machine, or one that exists, with every service of ``serve_config.yaml`` on it."""

import importlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from gesso_core.errors import ConfigError, Unavailable
from pydantic import BaseModel, ConfigDict, ValidationError

CONFIG_FILE = Path(__file__).with_name("serve_config.yaml")
LOOK_AGAIN_S = 0.25
STOP_S = 30.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_enable_worker_prestart": "0",  # idle workers of 60 MB each, for tasks that never come
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # the services are what this machine is for, not batch work
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A busy laptop needs longer than the half minute that Ray gives its own processes.
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_register_timeout_seconds": "180",
}

Report = Callable[[str, str], None]


class Application(BaseModel):
    """One application of the configuration: who builds it, and from what."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    import_path: str
    args: dict[str, Any] = {}

    def build(self) -> Any:
        """The Serve application."""
        from gesso_services.runtime.replica import ReplicaArguments

        module, _, builder = self.import_path.partition(":")
        return getattr(importlib.import_module(module), builder)(ReplicaArguments(**self.args))


def read_config(path: Path = CONFIG_FILE) -> list[Application]:
    """The applications of a Serve configuration file."""
    try:
        listed = yaml.safe_load(path.read_text())["applications"]
        return [Application.model_validate(one) for one in listed]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{path} is not a Serve configuration: {error}") from error


class LocalRay:
    """Ray and Serve, started or joined, and stopped only when started here."""

    def __init__(
        self, *, address: str | None, cpus: int, object_store_bytes: int, report: Report
    ) -> None:
        self.address, self.cpus = address, cpus
        self.object_store_bytes, self.report = object_store_bytes, report

    def start(self) -> None:
        """Start Ray without dashboard, or join the one at ``address``; then Serve without HTTP."""
        self.report("ray", f"joining {self.address}" if self.address else "starting")
        os.environ.update(ENVIRONMENT)
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._connect()
        except Exception as error:  # Ray raises bare exceptions when its processes do not come up
            raise Unavailable(
                f"Ray did not start: {last_line(str(error))}; is there enough memory and a core "
                "free? Its logs are in /tmp/ray/session_latest/logs"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own there
        self.report("ray", "ready")

    def deploy(self, *, timeout_s: float, meanwhile: Callable[[], None]) -> None:
        """Start every application, and return when all of them run.

        ``meanwhile`` is called while waiting and may raise. ``Unavailable`` when one fails.
        """
        from ray import serve

        applications = read_config()
        for one in applications:
            self.report(one.name, "starting")
        serve.run_many(
            [
                serve.RunTarget(one.build(), name=one.name, route_prefix=None)
                for one in applications
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._wait({one.name for one in applications}, time.monotonic() + timeout_s, meanwhile)

    def stop(self) -> None:
        """Stop the services, let running jobs go back to the queue, and end Ray."""
        import ray

        if not ray.is_initialized():
            return
        self.report("ray", "stopping")
        try:
            if not self.address:
                self._delete_applications(time.monotonic() + STOP_S)
        finally:
            ray.shutdown()
        self.report("ray", "stopped")

    def _delete_applications(self, deadline: float) -> None:
        """Each replica gives its jobs back and leaves the broker; then its process may end."""
        from ray import serve

        for name in serve.status().applications:
            serve.delete(name, _blocking=False)
        while serve.status().applications and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)

    def _wait(self, names: set[str], deadline: float, meanwhile: Callable[[], None]) -> None:
        from ray import serve

        while names:
            meanwhile()
            states = serve.status().applications
            for name in [name for name in names if name in states]:
                status = states[name].status
                if status == "RUNNING":
                    names.discard(name)
                    self.report(name, "ready")
                elif status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise Unavailable(f"{name} did not start: {_reason(states[name])}")
            if names and time.monotonic() > deadline:
                raise Unavailable(f"{', '.join(sorted(names))} did not start in time")
            time.sleep(LOOK_AGAIN_S)

    def _connect(self) -> None:
        import ray
        from ray import serve

        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        ray.init(
            **({"address": self.address} if self.address else self._own()),
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        serve.start(proxy_location="Disabled")

    def _own(self) -> dict[str, Any]:
        return {
            "address": "local",
            "num_cpus": self.cpus,
            "include_dashboard": False,
            "object_store_memory": self.object_store_bytes,
        }


def _reason(application: Any) -> str:
    messages = [one.message for one in application.deployments.values() if one.message]
    return last_line("\n".join(messages) or application.message)


def last_line(message: str) -> str:
    """The line of a traceback that says what was wrong, our own errors before all others."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("gesso_core.errors.")]
    named = [line for line in lines if "Error: " in line]
    return (ours or named or lines or ["no reason given"])[-1]
