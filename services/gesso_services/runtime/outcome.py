"""How a job ends: the rules of the worker as pure functions, without a broker.

An ``Ending`` says which state to write, whether to bury the job, and how to answer its message.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gesso_contracts import limits
from gesso_contracts.base import Message
from gesso_contracts.codec import contract_error
from gesso_contracts.jobs import Job, JobState, JobStatus
from gesso_contracts.problem import Problem
from gesso_core.errors import (
    Cancelled,
    GessoError,
    InvalidRequest,
    OutOfMemory,
    Unavailable,
)
from pydantic import ValidationError

from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.jobs import evolve, first_state, now
from gesso_services.runtime.problems import problem_of
from gesso_services.runtime.settings import JobSettings

log = logging.getLogger(__name__)

MAX_DELAY_S = 30.0

JobHandler = Callable[[Any, JobContext], Awaitable[Message]]


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job: the message it takes, the one it gives, and what is done in between."""

    request: type[Message]
    result: type[Message]
    handler: JobHandler


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What is due for a job; ``status`` ``None`` leaves its state alone."""

    status: JobStatus | None
    answer: Literal["ack", "term", "nak"] = "ack"
    result: Message | None = None
    problem: Problem | None = None
    delay_s: float = 0.0
    count_attempt: bool = True
    bury: bool = False


def skipped() -> Ending:
    """Nothing to do any more."""
    return Ending(status=None)


def given_back() -> Ending:
    """The replica stops; another one may start at once."""
    return Ending(status="queued", answer="nak", count_attempt=False)


def before_start(state: JobState, sequence: int, max_attempts: int) -> Ending | None:
    """How a delivered job ends without being started; ``None`` when it is to be started.

    ``sequence`` is the place of the delivered message in the queue: a second message of the same
    job, sent by a client that tried again late, has another one and is dropped.
    """
    if state.is_final or state.queue_sequence not in (None, sequence):
        return skipped()
    if state.cancel_requested:
        return Ending(status="cancelled")
    if state.attempt >= max_attempts:
        return _poison(f"{state.attempt} workers died of it or gave up on it", state)
    return None


async def of_handler(
    kinds: Mapping[str, JobKind],
    job: Job,
    context: JobContext,
    state: JobState,
    settings: JobSettings,
) -> Ending:
    """Run the handler of ``job`` and say how the job ends. ``state`` is that of the start."""
    try:
        kind = _kind(kinds, job)
        request = _request(kind, job)
        result = await kind.handler(request, context)
        assert isinstance(result, kind.result), f"{job.kind} gave {type(result).__name__}"
        return Ending(status="succeeded", result=result)
    except Cancelled:
        return Ending(status="cancelled")
    except Unavailable as error:
        return _wait_for_part(error, state, settings)
    except GessoError as error:
        answer: Literal["ack", "term"] = "term" if isinstance(error, InvalidRequest) else "ack"
        return Ending(status="failed", answer=answer, problem=problem_of(error))
    except MemoryError:
        problem = problem_of(OutOfMemory("the job does not fit into memory; try a smaller size"))
        return Ending(status="failed", problem=problem)
    except Exception as error:
        log.exception("handler of %s failed", job.kind)
        return try_again(error, state, settings)


def apply(
    ending: Ending, state: JobState, before: JobState, step: int, total_steps: int
) -> JobState | None:
    """``state`` as ``ending`` wants it; ``None`` when it is final, or another attempt's by now."""
    if state.is_final or ending.status is None:
        return None
    if ending.status == "queued":
        if state.attempt != before.attempt:
            return None
        if state.cancel_requested:
            return evolve(state, status="cancelled")
        attempt = state.attempt if ending.count_attempt else max(0, state.attempt - 1)
        return evolve(state, status="queued", attempt=attempt, problem=ending.problem)
    done = with_progress(state, step, total_steps)
    if ending.status != "succeeded":
        return evolve(done, status=ending.status, problem=ending.problem)
    assert ending.result is not None
    return evolve(
        done,
        status="succeeded",
        progress=1.0,
        problem=None,
        result=ending.result.model_dump(mode="json"),
        result_schema=ending.result.schema_name(),
    )


def with_progress(state: JobState, step: int, total_steps: int) -> JobState:
    """``state`` with the steps done so far."""
    if not total_steps:
        return state
    progress = min(1.0, step / total_steps)
    return state.model_copy(update={"step": step, "total_steps": total_steps, "progress": progress})


def unknown(job: Job) -> JobState:
    """A stand-in for the state of a job that the bucket has forgotten."""
    return first_state(job)


def _kind(kinds: Mapping[str, JobKind], job: Job) -> JobKind:
    if job.kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise InvalidRequest(f"{job.service} has no jobs of kind {job.kind!r}; it has {known}")
    return kinds[job.kind]


def _request(kind: JobKind, job: Job) -> Message:
    expected = kind.request.schema_name()
    if job.request_schema != expected:
        raise InvalidRequest(f"request {job.request_schema!r}; {job.kind} takes {expected!r}")
    try:
        return kind.request.model_validate(job.request)
    except ValidationError as error:
        wrong = contract_error(error, expected)
        raise InvalidRequest(str(wrong), field=wrong.field) from error


def _wait_for_part(error: Unavailable, state: JobState, settings: JobSettings) -> Ending:
    """A missing part is no fault of the job, so the attempt does not count; but not for ever."""
    waited_s = (now() - state.created_at).total_seconds()
    if waited_s > settings.retry_window_s:
        return Ending(status="failed", problem=problem_of(error))
    # The longer it has been waiting, the less often it asks.
    delay_s = min(MAX_DELAY_S, max(settings.retry_delay_s, waited_s / 4))
    return Ending(
        status="queued",
        answer="nak",
        problem=problem_of(error),
        delay_s=delay_s,
        count_attempt=False,
    )


def try_again(error: BaseException, state: JobState, settings: JobSettings) -> Ending:
    """Another attempt after an unexpected error, or the dead letters when there were enough."""
    if state.attempt >= settings.max_attempts:
        name = type(error).__name__
        return _poison(f"{state.attempt} attempts failed, the last one with {name}", state)
    delay_s = min(MAX_DELAY_S, settings.retry_delay_s * 2 ** (state.attempt - 1))
    return Ending(status="queued", answer="nak", problem=problem_of(error), delay_s=delay_s)


def _poison(what: str, state: JobState) -> Ending:
    last = f"; before that: {state.problem.detail}" if state.problem else ""
    detail = f"{what}; the job was moved to the dead letters{last}"
    problem = Problem(
        title="Poison job", status=500, code="poison", detail=detail[: limits.DETAIL_CHARS]
    )
    return Ending(status="failed", answer="term", problem=problem, bury=True)
