"""What a service is: its handlers, and the three moments of its life.

A service knows neither the broker's ways nor Ray; the runtime takes its ``ServiceSpec`` and runs as
many replicas of it as are needed.
"""

import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from gesso_contracts import ModelInUse, operations
from gesso_contracts.base import Message

from gesso_services.runtime import rpc
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.outcome import JobHandler, JobKind
from gesso_services.runtime.rpc import Endpoint, RpcHandler
from gesso_services.runtime.settings import ServiceSettings

R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class ServiceContext:
    """What the runtime gives to a service."""

    bus: Bus
    blobs: BlobStore
    metrics: Metrics

    async def call(
        self, service: str, verb: str, message: Message, reply: type[R], *, timeout: float = 30.0
    ) -> R:
        """Ask another service; see ``rpc.call``."""
        return await rpc.call(self.bus, service, verb, message, reply, timeout=timeout)

    def trial_job(self) -> JobContext:
        """A job context for a warm-up: nobody hears what it reports."""
        return JobContext(f"warm-up-{uuid.uuid4().hex[:12]}")


async def _nothing_to_do(_: ServiceContext) -> None:
    return None


async def _nothing_to_stop() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """One service: its name, its handlers, its settings, and how it comes and goes.

    ``rpc`` maps verbs and ``jobs`` maps kinds to handlers; the messages are those of
    ``operations`` unless ``messages`` names others as ``{verb or kind: (request, reply)}``.
    ``start`` loads; ``warm_up`` sends a real request through a real handler; ``stop`` lets go.
    ``in_use`` tells, once loaded, how the models compute and what they take; ``missing`` names
    those that cannot be used, and what to do about it.
    """

    name: str
    settings: ServiceSettings
    rpc: Mapping[str, RpcHandler] = field(default_factory=dict)
    jobs: Mapping[str, JobHandler] = field(default_factory=dict)
    messages: Mapping[str, tuple[type[Message], type[Message]]] = field(default_factory=dict)
    start: Callable[[ServiceContext], Awaitable[None]] = _nothing_to_do
    warm_up: Callable[[ServiceContext], Awaitable[None]] = _nothing_to_do
    stop: Callable[[], Awaitable[None]] = _nothing_to_stop
    models: tuple[str, ...] = ()
    in_use: Callable[[], Mapping[str, ModelInUse]] = dict
    missing: Callable[[], Mapping[str, str]] = dict

    def endpoints(self) -> dict[str, Endpoint]:
        """The verbs of this service with their messages."""
        table = operations.RPC.get(self.name, {})
        return {
            verb: Endpoint(verb=verb, request=self._types(verb, table)[0], handler=handler)
            for verb, handler in self.rpc.items()
        }

    def kinds(self) -> dict[str, JobKind]:
        """The kinds of jobs of this service with their messages."""
        table = operations.JOBS.get(self.name, {})
        kinds: dict[str, JobKind] = {}
        for kind, handler in self.jobs.items():
            request, result = self._types(kind, table)
            kinds[kind] = JobKind(request=request, result=result, handler=handler)
        return kinds

    def _types(
        self, name: str, table: Mapping[str, operations.Operation]
    ) -> tuple[type[Message], type[Message]]:
        if name in self.messages:
            return self.messages[name]
        return table[name].request, table[name].reply
