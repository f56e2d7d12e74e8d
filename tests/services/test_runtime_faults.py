"""What may die and be lost without a job being lost or shown twice."""

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable
from types import ModuleType

import pytest
from gesso_contracts import DeadLetter, decode, encode, subjects
from gesso_contracts.jobs import JobProgress, JobStateChanged
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import follow, wait_for
from gesso_services.runtime.jobs import JobStore, evolve, make_job
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.service import ServiceHost
from gesso_services.runtime.settings import Role

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

StartToy = Callable[..., Awaitable[ServiceHost]]
StartProcess = Callable[[], "subprocess.Popen[bytes]"]
Connect = Callable[[Role], Awaitable[Bus]]


async def test_a_worker_killed_in_the_middle_of_a_job_loses_nothing(
    store: JobStore, toy: ModuleType, start_toy_process: StartProcess
) -> None:
    first = start_toy_process()
    finals = []
    async with follow(store, "survivor", new=True) as events:
        request = toy.AddUp(numbers=[1] * 10, step_s=0.05)
        await store.submit("diffusion", "add-up", request, job_id="survivor")
        async for event in events:
            if isinstance(event, JobProgress) and event.step == 3 and first.poll() is None:
                first.kill()
                start_toy_process()
            if isinstance(event, JobStateChanged) and event.state.is_final:
                finals.append(event.state)
    assert [(state.status, state.result) for state in finals] == [("succeeded", {"total": 10})]
    assert finals[0].attempt == 2


async def test_a_killed_and_restarted_broker_loses_no_job(
    store: JobStore, toy: ModuleType, start_toy: StartToy, broker: NatsServer
) -> None:
    host = await start_toy(slots=1)
    request = toy.AddUp(numbers=[2] * 10, step_s=0.05)
    running, _ = await store.submit("diffusion", "add-up", request)
    waiting, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[3]))
    await asyncio.sleep(0.2)
    broker.kill()
    await asyncio.sleep(0.7)  # the running job comes to its end meanwhile
    host.check_health()
    assert host.bus is not None
    assert host.bus.seconds_lost() > 0
    await asyncio.to_thread(broker.start)
    first = await wait_for(store, running.id, 30)
    assert (first.status, first.result, first.attempt) == ("succeeded", {"total": 20}, 1)
    assert (await wait_for(store, waiting.id, 30)).result == {"total": 3}
    after, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[4]))
    assert (await wait_for(store, after.id, 30)).result == {"total": 4}
    host.check_health()


async def test_a_blob_written_while_the_broker_restarts_is_written_when_it_is_back(
    gateway: Bus, broker: NatsServer
) -> None:
    blobs = BlobStore(gateway)
    broker.kill()
    writing = asyncio.create_task(blobs.put(b"paint" * 500_000, "image/png"))
    await asyncio.sleep(0.2)
    assert not writing.done()
    await asyncio.to_thread(broker.start)
    ref = await asyncio.wait_for(writing, 30)
    assert await blobs.get(ref) == b"paint" * 500_000


async def test_a_job_submitted_while_no_replica_runs_waits_through_a_broker_restart(
    store: JobStore, toy: ModuleType, start_toy: StartToy, broker: NatsServer
) -> None:
    job, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[5, 6]))
    broker.kill()
    await asyncio.to_thread(broker.start)
    await store.bus.wait_connected()
    await start_toy()
    assert (await wait_for(store, job.id, 30)).result == {"total": 11}


async def test_an_idle_worker_hears_the_queue_again_after_a_restart(
    store: JobStore, toy: ModuleType, start_toy: StartToy, broker: NatsServer
) -> None:
    await start_toy()
    await asyncio.sleep(0.1)
    broker.kill()
    await asyncio.to_thread(broker.start)
    await store.bus.wait_connected()
    begun = time.monotonic()
    job, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[5, 6]))
    assert (await wait_for(store, job.id, 30)).result == {"total": 11}
    assert time.monotonic() - begun < 1.5


@pytest.mark.slow
async def test_a_job_that_kills_every_worker_ends_in_the_dead_letters_and_others_go_on(
    store: JobStore, toy: ModuleType, start_toy_process: StartProcess, connect: Connect
) -> None:
    poison, _ = await store.submit("diffusion", "end-the-process", toy.AddUp(numbers=[1]))
    good, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[8]))
    keeper = asyncio.create_task(_keep_one_running(start_toy_process))
    try:
        assert (await wait_for(store, good.id, 90)).result == {"total": 8}
        dead = await wait_for(store, poison.id, 90)
    finally:
        keeper.cancel()
    assert (dead.status, dead.attempt) == ("failed", 3)
    assert dead.problem is not None
    assert dead.problem.code == "poison"
    letters = await _dead_letters(await connect("admin"))
    assert [letter.job.id for letter in letters] == [poison.id]
    assert "3 workers died of it" in letters[0].reason


async def test_a_handler_that_always_raises_ends_in_the_dead_letters_with_its_error(
    store: JobStore, toy: ModuleType, start_toy: StartToy, connect: Connect
) -> None:
    await start_toy()
    job, _ = await store.submit("diffusion", "divide", toy.Divide(dividend=1, divisor=0))
    dead = await wait_for(store, job.id, 30)
    assert (dead.status, dead.attempt) == ("failed", 3)
    assert dead.problem is not None
    assert "3 attempts failed, the last one with ZeroDivisionError" in dead.problem.detail
    assert len(await _dead_letters(await connect("admin"))) == 1
    good, _ = await store.submit("diffusion", "divide", toy.Divide(dividend=1, divisor=2))
    assert (await wait_for(store, good.id, 30)).result == {"quotient": 0.5}


@pytest.mark.parametrize(
    ("how", "code", "status", "field"),
    [("invalid", "invalid_request", 422, "numbers"), ("memory", "out_of_memory", 507, None)],
)
async def test_an_error_of_the_job_fails_that_job_and_not_the_replica(
    store: JobStore,
    toy: ModuleType,
    start_toy: StartToy,
    how: str,
    code: str,
    status: int,
    field: str | None,
) -> None:
    host = await start_toy()
    job, _ = await store.submit("diffusion", "refuse-job", toy.Refuse(how=how))
    failed = await wait_for(store, job.id, 30)
    assert (failed.status, failed.attempt) == ("failed", 1)
    assert failed.problem is not None
    assert (failed.problem.code, failed.problem.status, failed.problem.field) == (
        code,
        status,
        field,
    )
    host.check_health()


async def test_a_missing_part_sends_the_job_back_without_counting_the_attempt(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    job, _ = await store.submit("diffusion", "refuse-job", toy.Refuse(how="unavailable"))
    await asyncio.sleep(0.6)
    state = await store.get(job.id)
    assert state.status in ("queued", "running")
    assert state.attempt <= 1
    assert state.problem is not None
    assert state.problem.code == "unavailable"
    assert (await store.cancel(job.id)).cancel_requested
    assert (await wait_for(store, job.id, 30)).status == "cancelled"


async def test_an_unknown_kind_and_an_unreadable_job_are_put_aside(
    store: JobStore, toy: ModuleType, start_toy: StartToy, connect: Connect
) -> None:
    await start_toy()
    odd, _ = await store.submit("diffusion", "juggle", toy.AddUp(numbers=[1]))
    failed = await wait_for(store, odd.id, 30)
    assert failed.problem is not None
    assert "no jobs of kind 'juggle'; it has add-up" in failed.problem.detail

    data, header = encode(toy.AddUp(numbers=[1]))
    await store.bus.js.publish(subjects.job("diffusion", "add-up"), data, headers=header)
    good, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[1]))
    assert (await wait_for(store, good.id, 30)).status == "succeeded"
    admin = await connect("admin")
    raw = await admin.js.get_last_msg(
        subjects.STREAM_DEAD_LETTERS, subjects.dead_letter("diffusion"), direct=True
    )
    assert json.loads(raw.data) == {"numbers": [1], "step_s": 0.0}
    assert "expected 'Job/1'" in raw.headers["Reason"]


async def test_of_two_workers_that_finish_the_same_job_one_is_seen(
    store: JobStore, toy: ModuleType
) -> None:
    job, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[1]))
    await store.change(job.id, lambda state: evolve(state, status="running", attempt=1))

    def finish(total: int) -> Awaitable[object]:
        return store.change(
            job.id,
            lambda state: (
                None
                if state.is_final
                else evolve(state, status="succeeded", result={"total": total})
            ),
        )

    ends = await asyncio.gather(finish(1), finish(2))
    assert sorted(end.won for end in ends) == [False, True]  # type: ignore[attr-defined]


async def test_a_second_message_of_the_same_job_is_dropped(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    """A client that tries again after the broker's window of duplicates puts a second one there."""
    host = await start_toy(slots=2)
    request = toy.AddUp(numbers=[1] * 10, step_s=0.05)
    await store.submit("diffusion", "add-up", request, job_id="again")
    await asyncio.sleep(0.1)
    data, header = encode(make_job("diffusion", "add-up", request, "again"))
    await store.bus.js.publish(subjects.job("diffusion", "add-up"), data, headers=header)
    done = await wait_for(store, "again", 30)
    assert (done.status, done.attempt) == ("succeeded", 1)
    assert host.bus is not None
    await asyncio.sleep(0.2)
    info = await host.bus.js.consumer_info(subjects.STREAM_JOBS, "diffusion")
    assert (info.num_pending, info.num_ack_pending) == (0, 0)


async def test_a_long_job_is_kept_alive_beyond_the_time_to_acknowledge(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    request = toy.AddUp(numbers=[1] * 4, step_s=0.5)  # 2 s, with 1 s to acknowledge
    job, _ = await store.submit("diffusion", "add-up", request)
    done = await wait_for(store, job.id, 30)
    assert (done.status, done.attempt) == ("succeeded", 1)


async def test_a_stopping_replica_finishes_what_is_short_and_gives_back_what_is_long(
    store: JobStore, toy: ModuleType, start_toy: StartToy
) -> None:
    host = await start_toy(slots=2)
    short, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[1] * 3, step_s=0.1))
    long, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[1] * 24, step_s=0.05))
    waiting, _ = await store.submit("diffusion", "add-up", toy.AddUp(numbers=[9]))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    await host.stop(grace_s=0.5)
    assert time.monotonic() - begun < 2
    assert (await store.get(short.id)).status == "succeeded"
    given_back = await store.get(long.id)
    assert (given_back.status, given_back.attempt) == ("queued", 0)
    await start_toy(slots=4)
    assert (await wait_for(store, waiting.id, 30)).status == "succeeded"
    assert (await wait_for(store, long.id, 30)).attempt == 1


async def test_an_idle_replica_stops_in_less_than_two_seconds(start_toy: StartToy) -> None:
    host = await start_toy()
    await asyncio.sleep(1.2)  # long enough for a request for jobs to expire unanswered
    begun = time.monotonic()
    await host.stop()
    assert time.monotonic() - begun < 1


@pytest.mark.slow
async def test_a_replica_stops_in_bounded_time_while_the_broker_is_away(
    store: JobStore, toy: ModuleType, start_toy: StartToy, broker: NatsServer
) -> None:
    host = await start_toy()
    await store.submit("diffusion", "add-up", toy.AddUp(numbers=[1] * 100, step_s=0.1))
    await asyncio.sleep(0.2)
    broker.kill()
    begun = time.monotonic()
    await host.stop(grace_s=0.2)
    assert time.monotonic() - begun < 4


async def _keep_one_running(start: StartProcess) -> None:
    while True:
        child = start()
        await asyncio.to_thread(child.wait)


async def _dead_letters(admin: Bus) -> list[DeadLetter]:
    count = (await admin.js.stream_info(subjects.STREAM_DEAD_LETTERS)).state.messages
    letters = []
    for sequence in range(1, count + 1):
        raw = await admin.js.get_msg(subjects.STREAM_DEAD_LETTERS, seq=sequence)
        letters.append(decode(raw.data, raw.headers, DeadLetter))
    return letters
