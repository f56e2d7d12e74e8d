"""Work waits for room in its order of arrival, and nothing is lost on the way."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from gesso_core.errors import Cancelled, OutOfMemory
from gesso_services.admission import Room
from gesso_services.runtime.job_context import JobContext

pytestmark = pytest.mark.anyio


class Work:
    """A piece of work that stays until it is told to go."""

    def __init__(self, room: Room, need: int, order: list[str], name: str) -> None:
        self.job = JobContext(name)
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._run(room, need, order))

    async def _run(self, room: Room, need: int, order: list[str]) -> None:
        async with room.reserved(need, self.job, what="this"):
            order.append(self.job.id)
            await self.go.wait()

    async def finish(self) -> None:
        self.go.set()
        await self.task


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def room_of(capacity: int) -> Room:
    return Room(capacity, setting="GESSO_X_BYTES")


async def test_more_than_the_whole_room_is_refused_with_numbers_and_advice() -> None:
    room = room_of(10**9)
    with pytest.raises(
        OutOfMemory, match=r"1,440\.0 MB .* has 1,000\.0 MB; .*GESSO_X_BYTES of"
    ) as e:
        async with room.reserved(1_440_000_000, JobContext("a"), what="this picture"):
            pass
    assert "at least 1440000000" in e.value.message
    assert (room.used, room.waiting) == (0, 0)


async def test_a_small_one_does_not_overtake_a_large_one_that_waits() -> None:
    room, order = room_of(10), []
    first = Work(room, 6, order, "first")
    await settle()
    large = Work(room, 8, order, "large")
    await settle()
    small = Work(room, 2, order, "small")
    await settle()
    assert (order, room.used, room.waiting) == (["first"], 6, 2)
    await first.finish()
    await settle()
    assert order == ["first", "large", "small"]
    assert room.used == 10
    await large.finish()
    await small.finish()
    assert (room.used, room.waiting) == (0, 0)


async def test_who_is_withdrawn_while_waiting_frees_the_way_for_those_behind() -> None:
    room, order = room_of(10), []
    first = Work(room, 6, order, "first")
    await settle()
    large, small = Work(room, 8, order, "large"), Work(room, 3, order, "small")
    await settle()
    large.job.withdraw()
    with pytest.raises(Cancelled):
        await large.task
    await settle()
    assert (order, room.used, room.waiting) == (["first", "small"], 9, 0)
    await first.finish()
    await small.finish()
    assert room.used == 0


async def test_a_task_that_is_cancelled_in_any_moment_leaves_nothing_behind() -> None:
    for moments in range(8):
        room, order = room_of(10), []
        first = Work(room, 10, order, "first")
        await settle()
        waiting = Work(room, 5, order, "waiting")
        first.go.set()
        for _ in range(moments):
            await asyncio.sleep(0)
        waiting.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting.task
        await first.task
        assert (room.used, room.waiting) == (0, 0), moments


async def test_an_error_inside_gives_the_room_back() -> None:
    room = room_of(10)
    with pytest.raises(ValueError, match="inside"):
        async with room.reserved(10, JobContext("a"), what="this"):
            raise ValueError("inside")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(room.reserved(10, JobContext("b"), what="this"))
        assert room.used == 10


async def test_a_hundred_of_mixed_sizes_all_get_in_and_never_more_than_fits() -> None:
    room, done = room_of(100), []

    async def work(index: int) -> None:
        async with room.reserved(1 + 37 * index % 100, JobContext(f"j{index}"), what="this"):
            assert room.used <= 100
            await asyncio.sleep(0)
            done.append(index)

    await asyncio.gather(*(work(index) for index in range(100)))
    assert sorted(done) == list(range(100))
    assert (room.used, room.waiting) == (0, 0)
