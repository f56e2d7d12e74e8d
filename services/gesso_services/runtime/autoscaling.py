"""How many replicas a service needs: from its backlog on the bus and its replicas' own load.

Ray Serve's controller imports this module and calls the policy in every round. Asking the broker
happens beside it, in a short task at most every ``poll_s`` seconds, so a round never waits. When
the broker does not answer, the number of replicas stays as it is.
"""

import asyncio
import logging
import time
from typing import Any

from gesso_core.errors import GessoError
from nats.errors import Error as NatsError

from gesso_services.runtime.connection import Bus
from gesso_services.runtime.feed import backlog
from gesso_services.runtime.settings import role_of


class BacklogPolicy:
    """One replica per ``jobs_per_replica`` jobs and per ``calls_per_replica`` calls in flight.

    Bounds, delays and smoothing are applied by Ray Serve from the autoscaling configuration.
    """

    def __init__(
        self, service: str, jobs_per_replica: float, calls_per_replica: float, poll_s: float = 2.0
    ) -> None:
        self.service = service
        self.jobs_per_replica = jobs_per_replica
        self.calls_per_replica = calls_per_replica
        self.poll_s = poll_s
        self.backlog: int | None = None
        self._asked_at = 0.0
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas, and what it was made from."""
        self._ask_if_due()
        if self.backlog is None:
            return context.target_num_replicas, {}
        calls = sum((context.aggregated_metrics or {}).get("calls", {}).values())
        wanted = max(self.backlog / self.jobs_per_replica, calls / self.calls_per_replica)
        if context.current_num_replicas == 0:
            # Serve takes the number as it is when it starts from zero; one is enough to begin.
            wanted = min(wanted, 1.0)
        return wanted, {"backlog": self.backlog, "calls": calls}

    def _ask_if_due(self) -> None:
        if self._asking is not None and not self._asking.done():
            return
        if time.monotonic() - self._asked_at >= self.poll_s:
            self._asked_at = time.monotonic()
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        try:
            self.backlog = await backlog_of(self.service)
        except (GessoError, NatsError, OSError, TimeoutError) as error:
            self.backlog = None
            logging.getLogger(__name__).warning("backlog of %s unknown: %s", self.service, error)


async def backlog_of(service: str) -> int:
    """Jobs of ``service`` that wait or run, asked over a connection of its own."""
    bus = await Bus.connect(role_of(service), name=f"{service}-autoscaling")
    try:
        return await backlog(bus, service)
    finally:
        await bus.close()
