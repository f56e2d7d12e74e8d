"""The rules of how a job ends, without a broker."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from gesso_contracts import TRANSITIONS, JobState, Problem
from gesso_core.errors import Cancelled, GessoError, InvalidRequest, OutOfMemory, Unavailable
from gesso_services.runtime import outcome
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.jobs import evolve, make_job, request_sha256
from gesso_services.runtime.outcome import Ending, JobKind
from gesso_services.runtime.problems import error_of, problem_of
from gesso_services.runtime.settings import JobSettings

pytestmark = pytest.mark.anyio

NOW = datetime.now(UTC)
STATE = JobState(
    id="j",
    service="diffusion",
    kind="add-up",
    status="running",
    attempt=1,
    created_at=NOW,
    updated_at=NOW,
    request_sha256="0" * 64,
    queue_sequence=7,
)


def state(**changes: Any) -> JobState:
    return STATE.model_copy(update=changes)


@pytest.mark.parametrize(
    ("found", "sequence", "expected"),
    [
        (state(status="succeeded"), 7, Ending(status=None)),
        (state(status="failed"), 7, Ending(status=None)),
        (state(status="running"), 8, Ending(status=None)),
        (state(cancel_requested=True), 7, Ending(status="cancelled")),
        (state(attempt=2), 7, None),
        (state(status="queued", attempt=0, queue_sequence=None), 9, None),
    ],
)
def test_what_happens_to_a_delivered_job_before_it_starts(
    found: JobState, sequence: int, expected: Ending | None
) -> None:
    assert outcome.before_start(found, sequence, max_attempts=3) == expected


def test_a_job_that_was_started_too_often_is_buried() -> None:
    ending = outcome.before_start(state(attempt=3), 7, max_attempts=3)
    assert ending is not None
    assert (ending.status, ending.answer, ending.bury) == ("failed", "term", True)
    assert ending.problem is not None
    assert ending.problem.code == "poison"


@pytest.mark.parametrize(
    ("error", "status", "answer"),
    [
        (Cancelled("j", after=1), "cancelled", "ack"),
        (InvalidRequest("no"), "failed", "term"),
        (OutOfMemory("no"), "failed", "ack"),
        (MemoryError(), "failed", "ack"),
        (Unavailable("no"), "queued", "nak"),
        (ValueError("no"), "queued", "nak"),
    ],
)
async def test_how_each_error_of_a_handler_ends_its_job(
    toy: ModuleType, error: Exception, status: str, answer: str
) -> None:
    async def handler(request: Any, job: JobContext) -> Any:
        raise error

    ending = await run(toy, handler)
    assert (ending.status, ending.answer) == (status, answer)
    assert isinstance(error, ValueError) == (ending.count_attempt and status == "queued")


async def test_a_request_of_another_schema_or_shape_is_refused(toy: ModuleType) -> None:
    kinds = {"add-up": JobKind(request=toy.AddUp, result=toy.AddedUp, handler=toy.add_up)}
    job = make_job("diffusion", "add-up", toy.AddUp(numbers=[1]), "j")
    for wrong, complaint in (
        (job.model_copy(update={"request_schema": "AddUp/2"}), "takes 'AddUp/1'"),
        (job.model_copy(update={"request": {"numbers": "x"}}), "field 'numbers'"),
        (job.model_copy(update={"kind": "juggle"}), "no jobs of kind 'juggle'"),
    ):
        ending = await outcome.of_handler(kinds, wrong, JobContext("j"), STATE, JobSettings())
        assert ending.answer == "term"
        assert ending.problem is not None
        assert complaint in ending.problem.detail


async def test_waiting_for_a_missing_part_ends_after_the_window(toy: ModuleType) -> None:
    async def handler(request: Any, job: JobContext) -> Any:
        raise Unavailable("the autoencoder is away")

    now = datetime.now(UTC)
    young = await run(toy, handler, state(created_at=now - timedelta(seconds=40)))
    old = await run(toy, handler, state(created_at=now - timedelta(seconds=700)))
    assert (young.status, old.status) == ("queued", "failed")
    assert 9 < young.delay_s < 15
    assert old.problem is not None
    assert old.problem.code == "unavailable"


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_a_final_state_never_changes(status: str) -> None:
    assert TRANSITIONS[state(status=status).status] == frozenset()
    ending = Ending(status="failed", problem=problem_of(ValueError()))
    assert outcome.apply(ending, state(status=status), STATE, 1, 2) is None


def test_giving_back_does_not_count_the_attempt_and_keeps_other_attempts_alone() -> None:
    given = outcome.apply(outcome.given_back(), STATE, STATE, 1, 2)
    assert given is not None
    assert (given.status, given.attempt) == ("queued", 0)
    assert outcome.apply(outcome.given_back(), state(attempt=2), STATE, 1, 2) is None


def test_a_job_given_back_after_it_was_withdrawn_is_cancelled() -> None:
    given = outcome.apply(outcome.given_back(), state(cancel_requested=True), STATE, 1, 2)
    assert given is not None
    assert given.status == "cancelled"


def test_a_state_is_always_later_than_the_one_before() -> None:
    future = state(updated_at=NOW + timedelta(hours=1))
    assert evolve(future).updated_at > future.updated_at


def test_the_hash_of_a_request_ignores_the_order_of_fields_and_the_id(toy: ModuleType) -> None:
    one = make_job("diffusion", "divide", toy.Divide(dividend=1, divisor=2), "a")
    turned = one.model_copy(update={"id": "b", "request": {"divisor": 2, "dividend": 1}})
    other = make_job("diffusion", "divide", toy.Divide(dividend=2, divisor=1), "a")
    assert request_sha256(one) == request_sha256(turned) != request_sha256(other)


def test_every_error_survives_the_way_through_a_problem() -> None:
    for cls in [InvalidRequest, OutOfMemory, Unavailable]:
        error = error_of(problem_of(cls("what to do", field="width")))
        assert type(error) is cls
        assert (error.message, error.field, error.status) == ("what to do", "width", cls.status)
    cancelled = error_of(problem_of(Cancelled("j", after=3)))
    assert isinstance(cancelled, Cancelled)


def test_a_problem_of_an_unknown_code_keeps_its_status() -> None:
    problem = Problem(title="Teapot", status=418, code="teapot", detail="short and stout")
    error = error_of(problem)
    assert type(error) is GessoError
    assert (error.status, error.code) == (418, "teapot")


async def test_a_withdrawn_job_raises_at_its_next_report_from_a_thread() -> None:
    context = JobContext("j")

    def work() -> None:
        context.report(1, 3)
        context.withdraw()
        context.report(2, 3)

    with pytest.raises(Cancelled, match="job j was cancelled after step 2"):
        await asyncio.to_thread(work)
    assert context.cancelled
    await asyncio.wait_for(context.wait_cancelled(), 1)


async def test_previews_are_dropped_when_too_many_or_too_large() -> None:
    shown: list[Any] = []

    async def publish(note: Any) -> None:
        shown.append(note)

    context = JobContext("j", publish=publish, previews_per_s=1.0)
    assert context.wants_preview
    assert not context.preview(bytes(1_000_000), 1)
    assert context.preview(b"x", 1)
    assert not context.wants_preview
    assert not context.preview(b"y", 2)
    await context.close()
    assert [note.image for note in shown] == [b"x"]


async def run(toy: ModuleType, handler: Any, found: JobState | None = None) -> Ending:
    # A job of its own age: one that waits is given up after minutes, which a whole run may take.
    found = found or state(created_at=datetime.now(UTC))
    kind = JobKind(request=toy.AddUp, result=toy.AddedUp, handler=toy.add_up)
    job = make_job("diffusion", "add-up", toy.AddUp(numbers=[1]), "j")
    kinds = {"add-up": replace(kind, handler=handler)}
    return await outcome.of_handler(kinds, job, JobContext("j"), found, JobSettings())
