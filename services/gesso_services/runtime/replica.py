"""A replica as Ray Serve sees it, and the builder that ``serve_config.yaml`` names.

Ray Serve places replicas, watches their health and chooses their number. Work does not come through
it: each replica is itself the endpoint and the consumer on the bus.
"""

import importlib
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from gesso_services.runtime.log import configure_logging
from gesso_services.runtime.service import ServiceHost, ServiceSpec
from gesso_services.runtime.settings import ServiceSettings

POLICY = "gesso_services.runtime.autoscaling:BacklogPolicy"
LOOK_BACK_S = 30.0


class ReplicaArguments(BaseModel):
    """Arguments of one application: the service, and where its specification is built."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service: str
    factory: str | None = None

    def build_spec(self) -> ServiceSpec:
        """The specification, from ``module:function``; by default ``gesso_services.<service>``."""
        path = self.factory or f"gesso_services.{self.service.replace('-', '_')}:build_service"
        module, _, function = path.partition(":")
        factory: Callable[[], ServiceSpec] = getattr(importlib.import_module(module), function)
        return factory()


class Replica:
    """One replica; it counts as started once a real request went through it."""

    # Ray Serve awaits an async constructor in the loop that the replica lives in, and counts the
    # replica as started only when it returns.
    async def __init__(self, arguments: ReplicaArguments) -> None:  # type: ignore[misc]
        configure_logging(arguments.service)
        self.host = ServiceHost(arguments.build_spec())
        await self.host.start()

    def check_health(self) -> None:
        """Raise when Ray Serve should replace this replica."""
        self.host.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Calls and jobs in flight here."""
        return self.host.load()

    async def __del__(self) -> None:
        # Ray Serve awaits this within `graceful_shutdown_timeout_s`.
        if hasattr(self, "host"):
            await self.host.stop()


def build_app(arguments: ReplicaArguments) -> Any:
    """The Serve application of one service; its options come from ``GESSO_<SERVICE>_*``."""
    # The service's own settings class: its default of slots decides what one replica is worth.
    settings = arguments.build_spec().settings
    deployment = serve.deployment(
        Replica, name=arguments.service, **deployment_options(arguments.service, settings)
    )
    return deployment.bind(arguments)


def deployment_options(service: str, settings: ServiceSettings) -> dict[str, Any]:
    """Options of the Serve deployment: where it may run, how many, how it ends."""
    return {
        "ray_actor_options": {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": dict(settings.resources),
        },
        "max_ongoing_requests": settings.max_ongoing_requests,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": 30.0,
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "max_replicas": max(1, settings.min_replicas, settings.max_replicas),
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": {
                    "service": service,
                    "jobs_per_replica": settings.slots * settings.backlog_per_slot,
                    "calls_per_replica": float(settings.rpc_concurrency),
                    "poll_s": settings.backlog_poll_s,
                },
            },
        },
    }
