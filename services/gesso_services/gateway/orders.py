"""Orders: what one request of a person becomes as jobs, and what becomes of those.

A caller that leaves withdraws the jobs of its order; with an ``Idempotency-Key`` they go on, and
the same request again joins them.
"""

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Header, Request
from gesso_contracts import JobState, JobStateChanged
from gesso_contracts.base import Message
from gesso_core.errors import GessoError

from gesso_services.gateway import streams
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.problems import EdgeError
from gesso_services.runtime.job_events import Event, follow
from gesso_services.runtime.problems import error_of

RANDOM_SEEDS = 2**32  # small enough for a JavaScript number
T = TypeVar("T")
R = TypeVar("R", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)
Tell = Callable[[int, Event], Awaitable[None]]
IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=200,
        description="The same key again joins the same jobs instead of starting new ones.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Order(Generic[M_co]):
    """Jobs of one kind for one service, as pairs of id and message; ``lasting`` ones outlive the
    connection that asked for them.
    """

    service: str
    kind: str
    jobs: tuple[tuple[str, M_co], ...]
    lasting: bool


def name_and_seed(caller: str, idempotency_key: str | None, prefix: str) -> tuple[str, int]:
    """Name and seed for the jobs of a request: drawn, or derived from the key of this caller."""
    if idempotency_key is None:
        return f"{prefix}-{uuid.uuid4().hex}", secrets.randbelow(RANDOM_SEEDS)
    digest = hashlib.sha256(f"{caller}\0{idempotency_key}".encode()).digest()
    return f"{prefix}-key-{digest[:16].hex()}", int.from_bytes(digest[16:20])


async def fulfil(fabric: Fabric, order: Order[Message], tell: Tell | None = None) -> list[JobState]:
    """Submit every job of ``order``, pass on what happens to ``tell``, and return the last states.

    Raises what the first failed job failed with, and 504 at the deadline. Whenever this is left
    without all results, the jobs that are not ``lasting`` are withdrawn.
    """
    try:
        return await _all(fabric, order, tell)
    except TimeoutError as error:
        raise EdgeError(
            504,
            "deadline_exceeded",
            f"the work was not done within {fabric.settings.deadline_s:g} s; ask for less of it, "
            "or submit jobs with PUT /v1/jobs/{id} and come back",
        ) from error
    except ExceptionGroup as group:
        raise _first(group) from group


async def withdraw(fabric: Fabric, order: Order[Message]) -> None:
    """Cancel every job of ``order`` that is not final yet."""
    for job_id, _ in order.jobs:
        with suppress(GessoError):  # it may never have been accepted
            await fabric.jobs.cancel(job_id)


async def events(
    fabric: Fabric, order: Order[Message]
) -> AsyncGenerator[tuple[int, Event] | None, None]:
    """Every event of every job as it comes, with the number of its job, and None where nothing
    happens for a while. Raises like :func:`fulfil`; closed early, it withdraws the jobs.
    """
    told: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def tell(index: int, event: Event) -> None:
        told.put_nowait((index, event))

    work = fabric.in_background(fulfil(fabric, order, tell))
    work.add_done_callback(lambda _: told.put_nowait(None))
    beats = streams.with_heartbeats(_drain(told), fabric.settings.heartbeat_s)
    try:
        async with aclosing(beats):
            async for item in beats:
                yield item
        await work
    finally:
        work.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None when the client leaves first, which cancels it."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


def raise_unless_succeeded(state: JobState) -> None:
    """Raise what a final job failed with."""
    if state.problem is not None:
        raise error_of(state.problem)
    if state.status != "succeeded":
        raise EdgeError(409, "cancelled", f"job {state.id} was cancelled; submit it under a new id")


def result_of(state: JobState, result: type[R]) -> R:
    """What a final job made; raises what it failed with."""
    raise_unless_succeeded(state)
    if state.result_schema != result.schema_name():
        raise EdgeError(
            409,
            "other_result",
            f"job {state.id} is of the kind {state.kind!r} and made no {result.__name__}; "
            f"its result is at /v1/jobs/{state.id}/result",
        )
    return result.model_validate(state.result)


async def _all(fabric: Fabric, order: Order[Message], tell: Tell | None) -> list[JobState]:
    try:
        async with asyncio.timeout(fabric.settings.deadline_s), asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_one(fabric, order, index, tell))
                for index in range(len(order.jobs))
            ]
    except BaseException:
        if not order.lasting:
            fabric.in_background(withdraw(fabric, order))
        raise
    return [task.result() for task in tasks]


async def _one(fabric: Fabric, order: Order[Message], index: int, tell: Tell | None) -> JobState:
    job_id, message = order.jobs[index]
    async with follow(fabric.jobs, job_id, new=True) as happened:
        state, _ = await fabric.jobs.submit(order.service, order.kind, message, job_id=job_id)
        happened.add(JobStateChanged(state=state))
        async for event in happened:
            if isinstance(event, JobStateChanged):
                state = event.state
            if tell is not None:
                await tell(index, event)
    raise_unless_succeeded(state)
    return state


def _first(error: Exception) -> Exception:
    """The error of the job that failed first, out of the group that the tasks raised."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _drain(
    told: "asyncio.Queue[tuple[int, Event] | None]",
) -> AsyncIterator[tuple[int, Event]]:
    while (item := await told.get()) is not None:
        yield item
