"""Calls over the bus: many at once, refused when too many, errors that keep their class."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import ModuleType

import pytest
from gesso_contracts import AskMetrics, AskReady, EmbedText, MetricsText, ServiceReady, subjects
from gesso_core.errors import GessoError, InvalidRequest, OutOfMemory, Overloaded, Unavailable
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.rpc import call
from gesso_services.runtime.service import ServiceHost
from gesso_services.runtime.settings import Role
from gesso_services.runtime.trace import trace_id, use_trace
from nats.aio.msg import Msg

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

StartToy = Callable[..., Awaitable[ServiceHost]]


async def test_a_call_is_answered(gateway: Bus, toy: ModuleType, start_toy: StartToy) -> None:
    await start_toy()
    answer = await call(gateway, "diffusion", "add", toy.AddUp(numbers=[1, 2]), toy.AddedUp)
    assert answer == toy.AddedUp(total=3)


async def test_calls_run_at_once_and_not_one_after_another(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy(rpc_concurrency=8)
    slow = toy.AddUp(numbers=[1], step_s=0.1)
    begun = time.monotonic()
    answers = await asyncio.gather(
        *(call(gateway, "diffusion", "add", slow, toy.AddedUp) for _ in range(8))
    )
    assert len(answers) == 8
    assert time.monotonic() - begun < 0.4  # one after another would take 0.8 s


async def test_a_full_service_refuses_at_once_and_recovers(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy(rpc_concurrency=1, rpc_queue=1)
    slow = toy.AddUp(numbers=[1], step_s=0.3)
    begun = time.monotonic()
    ends = await asyncio.gather(
        *(call(gateway, "diffusion", "add", slow, toy.AddedUp) for _ in range(5)),
        return_exceptions=True,
    )
    refused = [end for end in ends if isinstance(end, Overloaded)]
    assert len(refused) == 3
    assert refused[0].status == 503
    assert time.monotonic() - begun < 1
    again = await call(gateway, "diffusion", "add", toy.AddUp(numbers=[1]), toy.AddedUp)
    assert again.total == 1


@pytest.mark.parametrize(
    ("how", "expected", "field"),
    [
        ("invalid", InvalidRequest, "numbers"),
        ("memory", OutOfMemory, None),
        ("unavailable", Unavailable, None),
    ],
)
async def test_an_error_keeps_its_class_message_and_field(
    gateway: Bus,
    toy: ModuleType,
    start_toy: StartToy,
    how: str,
    expected: type[GessoError],
    field: str | None,
) -> None:
    await start_toy()
    with pytest.raises(expected) as caught:
        await call(gateway, "diffusion", "refuse", toy.Refuse(how=how), toy.AddedUp)
    assert type(caught.value) is expected
    assert caught.value.field == field


async def test_a_bug_in_a_handler_is_an_internal_error_without_its_inner_life(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    with pytest.raises(GessoError, match="KeyError inside the service") as caught:
        await call(gateway, "diffusion", "refuse", toy.Refuse(how="unheard of"), toy.AddedUp)
    assert (caught.value.status, caught.value.code) == (500, "internal")


async def test_a_call_to_nobody_fails_at_once(gateway: Bus, toy: ModuleType) -> None:
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="no replica of 'diffusion' is ready for 'add'"):
        await call(gateway, "diffusion", "add", toy.AddUp(numbers=[]), toy.AddedUp)
    assert time.monotonic() - begun < 0.5


async def test_a_call_ends_at_its_deadline_on_both_sides(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    host = await start_toy()
    with pytest.raises(Unavailable, match=r"did not answer|could not finish"):
        await call(
            gateway,
            "diffusion",
            "add",
            toy.AddUp(numbers=[1] * 100, step_s=0.1),
            toy.AddedUp,
            timeout=0.2,
        )
    await asyncio.sleep(0.1)
    assert host.rpc is not None
    assert host.rpc.in_flight == 0


async def test_a_message_of_another_kind_is_refused_with_both_names(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    with pytest.raises(InvalidRequest, match="'EmbedText/1'; expected 'AddUp/1'"):
        await call(gateway, "diffusion", "add", EmbedText(model="m", prompts=["x"]), toy.AddedUp)


async def test_a_message_too_large_for_the_broker_is_refused_here(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    with pytest.raises(InvalidRequest, match="the broker takes 8388608"):
        await call(gateway, "diffusion", "add", toy.AddUp(numbers=[10**8] * 10**6), toy.AddedUp)


async def test_a_ready_replica_says_so_and_can_be_discovered(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy(slots=3)
    ready = await call(gateway, "diffusion", "ready", AskReady(), ServiceReady)
    assert (ready.service, ready.ready, ready.slots, ready.running) == ("diffusion", True, 3, 0)
    found = await gateway.nc.request("$SRV.INFO.diffusion", timeout=1)
    assert subjects.rpc("diffusion", "add") in found.data.decode()


async def test_a_busy_replica_still_says_that_it_is_ready(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy(rpc_concurrency=1, rpc_queue=0)
    slow = toy.AddUp(numbers=[1], step_s=0.5)
    busy = asyncio.create_task(call(gateway, "diffusion", "add", slow, toy.AddedUp))
    await asyncio.sleep(0.05)
    assert (await call(gateway, "diffusion", "ready", AskReady(), ServiceReady)).ready
    assert not busy.done()
    await busy


async def test_replacing_a_replica_under_load_loses_no_call(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    first = await start_toy()
    await start_toy()
    request = toy.AddUp(numbers=[1, 2])

    async def caller() -> int:
        answers = [
            await call(gateway, "diffusion", "add", request, toy.AddedUp, timeout=5)
            for _ in range(50)
        ]
        return sum(answer.total for answer in answers)

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    await asyncio.sleep(0.02)
    await first.stop()
    assert await asyncio.gather(*callers) == [150] * 4


async def test_a_message_that_comes_while_a_replica_leaves_is_handed_over(
    gateway: Bus, connect: Callable[[Role], Awaitable[Bus]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await connect("diffusion")
    subject, taken = subjects.rpc("diffusion", "add"), list[bytes]()

    async def take(message: Msg) -> None:
        taken.append(message.data)

    subscription = await replica.nc.subscribe(subject, cb=take)
    await replica.ready()
    transport = replica.nc._transport
    drain = transport.drain

    async def slowly() -> None:
        await drain()
        await asyncio.sleep(0.1)

    monkeypatch.setattr(transport, "drain", slowly)
    await replica.nc.flush()  # what is sent within a tenth of a second stays in the client's buffer
    leaving = asyncio.create_task(replica.leave(subscription))
    await asyncio.sleep(0.03)
    await gateway.nc.publish(subject, b"late")
    await leaving
    assert taken == [b"late"]


async def test_a_replica_gives_its_metrics(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    await start_toy()
    await call(gateway, "diffusion", "add", toy.AddUp(numbers=[1]), toy.AddedUp)
    text = (await call(gateway, "diffusion", "metrics", AskMetrics(), MetricsText)).text
    assert 'gesso_rpc_seconds_count{code="ok",service="diffusion",verb="add"} 1.0' in text
    assert 'gesso_jobs_backlog{service="diffusion"} 0.0' in text


async def test_a_call_carries_the_trace_of_its_caller(
    gateway: Bus, toy: ModuleType, start_toy: StartToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    async def remember(request: object) -> object:
        seen.append(trace_id())
        return toy.AddedUp(total=0)

    monkeypatch.setattr(toy, "add", remember)
    await start_toy()
    with use_trace("00-" + "a" * 32 + "-" + "b" * 16 + "-01"):
        await call(gateway, "diffusion", "add", toy.AddUp(numbers=[]), toy.AddedUp)
    assert seen == ["a" * 32]


async def test_a_stopping_replica_finishes_the_calls_it_has_taken(
    gateway: Bus, toy: ModuleType, start_toy: StartToy
) -> None:
    host = await start_toy()
    slow = asyncio.create_task(
        call(gateway, "diffusion", "add", toy.AddUp(numbers=[4], step_s=0.2), toy.AddedUp)
    )
    await asyncio.sleep(0.05)
    await host.stop()
    assert (await slow).total == 4
    with pytest.raises(Unavailable, match="no replica"):
        await call(gateway, "diffusion", "add", toy.AddUp(numbers=[4]), toy.AddedUp)
