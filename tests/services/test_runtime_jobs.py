"""What a job promises, against a real broker and a service that really computes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import ModuleType

import pytest
from gesso_contracts.jobs import JobPreview, JobProgress, JobState, JobStateChanged
from gesso_core.errors import Conflict, InvalidRequest, NotFound
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.job_list import list_jobs
from gesso_services.runtime.jobs import JobStore, evolve
from gesso_services.runtime.service import ServiceHost

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

StartToy = Callable[..., Awaitable[ServiceHost]]


async def submit(store: JobStore, toy: ModuleType, numbers: list[int], **how: object) -> JobState:
    step_s = float(how.pop("step_s", 0.0))
    request = toy.AddUp(numbers=numbers, step_s=step_s)
    state, _ = await store.submit("diffusion", "add-up", request, **how)
    return state


async def test_a_job_runs_and_its_result_can_be_read(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    state = await submit(store, toy, [1, 2, 3])
    assert state.status == "queued"
    done = await wait_for(store, state.id, 30)
    assert (done.status, done.result, done.result_schema) == (
        "succeeded",
        {"total": 6},
        "AddedUp/1",
    )
    assert (done.step, done.total_steps, done.progress, done.attempt) == (3, 3, 1.0, 1)


async def test_progress_and_previews_arrive_per_step_and_in_order(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    async with follow(store, "steps", new=True) as events:
        await submit(store, toy, [5, 6, 7], job_id="steps", step_s=0.01)
        seen = [event async for event in events]
    steps = [event.step for event in seen if isinstance(event, JobProgress)]
    states = [event.state.status for event in seen if isinstance(event, JobStateChanged)]
    previews = [event for event in seen if isinstance(event, JobPreview)]
    assert steps == [1, 2, 3]
    assert states == ["running", "succeeded"]
    assert previews[0].image == b"5"
    assert isinstance(seen[-1], JobStateChanged)


async def test_a_late_subscriber_sees_the_state_first(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    job = await submit(store, toy, [1] * 20, step_s=0.02)
    await asyncio.sleep(0.15)
    async with follow(store, job.id) as events:
        first = await anext(events)
        assert isinstance(first, JobStateChanged)
        assert first.state.status == "running"
        assert first.state.step > 0
        last = [event async for event in events][-1]
    assert isinstance(last, JobStateChanged)
    assert last.state.status == "succeeded"


async def test_following_a_finished_job_gives_its_final_state_and_ends(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    job = await submit(store, toy, [1])
    await wait_for(store, job.id, 30)
    async with follow(store, job.id) as events:
        seen = [event async for event in events]
    assert [event.state.status for event in seen if isinstance(event, JobStateChanged)] == [
        "succeeded"
    ]


async def test_the_same_id_with_the_same_request_is_the_same_job(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    request = toy.AddUp(numbers=[2, 2])
    first = await store.submit("diffusion", "add-up", request, job_id="twice")
    second = await store.submit("diffusion", "add-up", request, job_id="twice")
    assert (first[1], second[1]) == (True, False)
    host = await start_toy()
    await wait_for(store, "twice", 30)
    third, created = await store.submit("diffusion", "add-up", request, job_id="twice")
    assert (created, third.status, third.attempt) == (False, "succeeded", 1)
    assert 'gesso_jobs_total{kind="add-up",service="diffusion",status="succeeded"} 1.0' in (
        host.metrics.text()
    )


async def test_the_same_id_with_another_request_is_a_conflict(
    store: JobStore, toy: ModuleType
) -> None:
    await submit(store, toy, [1], job_id="taken")
    with pytest.raises(Conflict, match="job 'taken' exists with another request"):
        await submit(store, toy, [2], job_id="taken")


@pytest.mark.parametrize("job_id", ["", "Upper", "a.b", "a b", "../up", "-a", "x" * 65, "a\n"])
async def test_an_id_that_cannot_stand_in_a_subject_is_refused(
    store: JobStore, toy: ModuleType, job_id: str
) -> None:
    with pytest.raises(InvalidRequest, match="cannot stand in a subject"):
        await store.get(job_id)


async def test_a_job_too_large_for_the_queue_is_refused_at_the_door(
    store: JobStore, toy: ModuleType
) -> None:
    with pytest.raises(InvalidRequest, match="send large inputs as blobs"):
        await submit(store, toy, [10**9] * 200_000)


async def test_an_unknown_job_is_not_found(store: JobStore) -> None:
    with pytest.raises(NotFound, match="no job 'nobody'"):
        await store.get("nobody")


async def test_a_queued_job_is_cancelled_at_once_and_never_runs(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    job = await submit(store, toy, [1])
    assert (await store.cancel(job.id)).status == "cancelled"
    host = await start_toy()
    after = await submit(store, toy, [1])
    assert (await wait_for(store, after.id, 30)).status == "succeeded"
    assert (await store.get(job.id)).attempt == 0
    assert host.worker is not None
    assert host.worker.running == 0


async def test_cancelling_a_running_job_frees_its_slot_within_one_step(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy(slots=1)
    long = await submit(store, toy, [1] * 100, step_s=0.1)
    next_one = await submit(store, toy, [7])
    async with follow(store, long.id) as events:
        async for event in events:
            if isinstance(event, JobProgress) and event.step == 3:
                asked = await store.cancel(long.id)
                assert (asked.status, asked.cancel_requested) == ("running", True)
                begun = time.monotonic()
    assert (await wait_for(store, next_one.id, 30)).result == {"total": 7}
    assert time.monotonic() - begun < 0.5
    cancelled = await store.get(long.id)
    assert cancelled.status == "cancelled"
    assert cancelled.step <= 5


async def test_a_cancellation_that_nobody_heard_is_read_in_the_book(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    job = await submit(store, toy, [1] * 100, step_s=0.05)
    await asyncio.sleep(0.2)
    await store.change(job.id, lambda state: evolve(state, cancel_requested=True))
    assert (await wait_for(store, job.id, 30)).status == "cancelled"


async def test_cancelling_a_finished_job_changes_nothing(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    job = await submit(store, toy, [4])
    done = await wait_for(store, job.id, 30)
    assert await store.cancel(job.id) == done


async def test_several_jobs_run_at_once_up_to_the_slots(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    host = await start_toy(slots=3)
    jobs = [await submit(store, toy, [n] * 5, step_s=0.1) for n in range(6)]
    await asyncio.sleep(0.3)
    assert host.worker is not None
    assert host.worker.running == 3
    states = [(await wait_for(store, job.id, 30)).result for job in jobs]
    assert states == [{"total": 5 * n} for n in range(6)]


async def test_two_replicas_share_the_queue(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    first = await start_toy(slots=1)
    jobs = [await submit(store, toy, [n] * 2, step_s=0.05) for n in range(6)]
    second = await start_toy(slots=1)
    for job in jobs:
        assert (await wait_for(store, job.id, 30)).status == "succeeded"
    done = 'gesso_jobs_total{kind="add-up",service="diffusion",status="succeeded"}'
    counts = [
        float(line.split()[-1])
        for host in (first, second)
        for line in host.metrics.text().splitlines()
        if line.startswith(done)
    ]
    assert sum(counts) == 6
    assert len(counts) == 2


async def test_jobs_are_listed_last_changed_first_in_pages(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    for number in range(7):
        await submit(store, toy, [number], job_id=f"job-{number}")
    await store.cancel("job-2")
    page = await list_jobs(store, limit=3)
    assert [job.id for job in page.jobs] == ["job-2", "job-6", "job-5"]
    rest = await list_jobs(store, limit=10, cursor=page.cursor)
    assert [job.id for job in rest.jobs] == ["job-4", "job-3", "job-1", "job-0"]
    assert rest.cursor is None
    cancelled = await list_jobs(store, status="cancelled")
    assert [job.id for job in cancelled.jobs] == ["job-2"]
    assert (await list_jobs(store, service="autoencoder")).jobs == []


async def test_listing_an_empty_book_gives_an_empty_page(store: JobStore) -> None:
    page = await list_jobs(store)
    assert (page.jobs, page.cursor) == ([], None)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "9" * 30, "١"])
async def test_a_cursor_that_was_never_given_out_is_refused(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await list_jobs(store, cursor=cursor)


async def test_a_slow_follower_does_not_slow_the_worker_and_still_sees_the_end(
    store: JobStore, gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    async with follow(store, "many", new=True) as events:
        begun = time.monotonic()
        await submit(store, toy, [1] * 2000, job_id="many")
        assert (await wait_for(store, "many", 30)).status == "succeeded"
        assert time.monotonic() - begun < 5
        seen = [event async for event in events]  # reads only now
    assert len(seen) <= 70
    assert isinstance(seen[-1], JobStateChanged)
    assert seen[-1].state.status == "succeeded"
