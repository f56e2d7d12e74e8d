"""Short calls over the bus: NATS micro endpoints on one side, ``call`` on the other.

A subscription hands over one message at a time, so every call becomes a task of its own. At most
``concurrency`` of them work, ``queue`` more may wait, and the rest is refused at once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from gesso_contracts import decode, encode, headers, parse, subjects
from gesso_contracts.base import Message
from gesso_contracts.problem import MEDIA_TYPE, Problem
from gesso_core.errors import InvalidRequest, Overloaded, Unavailable
from nats import micro
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError, NoRespondersError
from nats.micro.request import Request

from gesso_services.runtime import trace
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.problems import error_of, problem_of

log = logging.getLogger(__name__)

LEAVE_S = 3.0  # a broker that has just died does not answer

R = TypeVar("R", bound=Message)
RpcHandler = Callable[[Any], Awaitable[Message]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One verb: the message it takes and the coroutine function that answers it.

    An ``urgent`` one is answered at once, also by a service that is busy: it asks how things are.
    """

    verb: str
    request: type[Message]
    handler: RpcHandler
    urgent: bool = False


class RpcServer:
    """The endpoints of one replica; replicas of one service share the calls."""

    def __init__(
        self,
        bus: Bus,
        service: str,
        endpoints: Mapping[str, Endpoint],
        *,
        concurrency: int,
        queue: int,
        metrics: Metrics,
    ) -> None:
        self.bus = bus
        self.service = service
        self.endpoints = endpoints
        self.limit = concurrency + queue
        self.metrics = metrics
        self._turn = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._micro: Any = None

    @property
    def in_flight(self) -> int:
        """Calls that are worked on or wait."""
        return len(self._tasks)

    async def start(self, metadata: Mapping[str, str] | None = None) -> None:
        """Answer calls from now on."""
        self._micro = await micro.add_service(
            self.bus.nc,
            name=self.service,
            version=version("gesso"),
            queue_group=self.service,
            metadata=dict(metadata or {}),
        )
        for endpoint in self.endpoints.values():
            await self._micro.add_endpoint(
                name=endpoint.verb,
                subject=subjects.rpc(self.service, endpoint.verb),
                handler=self._acceptor(endpoint),
            )
        await self.bus.ready()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, finish those that were taken, give up after ``grace_s`` seconds."""
        if self._micro is not None and self.bus.is_connected:
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                async with asyncio.timeout(LEAVE_S):
                    await self._leave(self._micro)
        self._micro = None
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()

    async def _leave(self, service: Any) -> None:
        # The library unsubscribes its endpoints without draining them, which would lose the calls
        # that are just arriving; drained ones are taken out of its hands.
        await self.bus.leave(*(point._subscription for point in service._endpoints))
        service._endpoints.clear()
        await service.stop()

    def _acceptor(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[None]]:
        async def accept(request: Request) -> None:
            if len(self._tasks) >= self.limit and not endpoint.urgent:
                self.metrics.call(endpoint.verb, Overloaded.code, 0.0)
                await _refuse(request, problem_of(Overloaded(f"{self.service} has no free place")))
                return
            task = asyncio.create_task(self._answer(endpoint, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _answer(self, endpoint: Endpoint, request: Request) -> None:
        begun, code = time.perf_counter(), "ok"
        header = request.headers or {}
        with trace.use_trace(header.get(headers.TRACEPARENT)):
            try:
                turn = contextlib.nullcontext() if endpoint.urgent else self._turn
                async with asyncio.timeout(_deadline(header)), turn:
                    message = decode(request.data, header, endpoint.request)
                    data, answer = encode(await endpoint.handler(message))
                await request.respond(data, headers=answer)
            except asyncio.CancelledError:
                await _refuse(request, problem_of(Unavailable(f"{self.service} is stopping")))
                raise
            except Exception as error:
                problem = _problem(error, self.service, endpoint.verb)
                code = problem.code
                await _refuse(request, problem)
        self.metrics.call(endpoint.verb, code, time.perf_counter() - begun)


def _deadline(header: Mapping[str, str]) -> float | None:
    try:
        return float(header[headers.DEADLINE])
    except (KeyError, ValueError):
        return None


def _problem(error: Exception, service: str, verb: str) -> Problem:
    if isinstance(error, TimeoutError):
        return problem_of(Unavailable(f"{service} could not finish {verb!r} before the deadline"))
    if isinstance(error, MaxPayloadError):
        return problem_of(InvalidRequest(f"the answer of {verb!r} is too large for a message"))
    problem = problem_of(error)
    if problem.code == "internal":
        log.exception("%s failed", verb, exc_info=error)
    return problem


async def _refuse(request: Request, problem: Problem) -> None:
    data, header = encode(problem)
    header[headers.CONTENT_TYPE] = MEDIA_TYPE
    try:
        await request.respond_error(str(problem.status), problem.code, data=data, headers=header)
    except NatsError as error:
        log.warning("could not send a problem: %s", error or type(error).__name__)


async def call(
    bus: Bus, service: str, verb: str, message: Message, reply: type[R], *, timeout: float = 30.0
) -> R:
    """Ask any replica of ``service``; ``timeout`` in seconds.

    Raises the error that the service raised, or ``Unavailable`` when none answers in time.
    """
    data, header = encode(message)
    header[headers.TRACEPARENT] = trace.child_of(trace.current_trace())
    header[headers.DEADLINE] = f"{timeout:.3f}"
    try:
        answer = await bus.nc.request(
            subjects.rpc(service, verb), data, timeout=timeout, headers=header
        )
    except NoRespondersError as error:
        raise Unavailable(f"no replica of {service!r} is ready for {verb!r}") from error
    except MaxPayloadError as error:
        raise InvalidRequest(
            f"a message of {len(data)} bytes for {verb!r}; the broker takes {bus.nc.max_payload}"
        ) from error
    except (NatsError, TimeoutError) as error:
        raise Unavailable(f"{service!r} did not answer {verb!r} within {timeout:g} s") from error
    answered = answer.headers or {}
    if headers.ERROR_CODE in answered:
        raise error_of(parse(answer.data, Problem))
    return decode(answer.data, answered, reply)
