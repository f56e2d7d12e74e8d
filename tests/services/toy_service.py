"""A small real service for the tests of the runtime: it adds numbers, one per step.

It takes the name of the diffusion service, because the broker knows roles by name.
"""

import asyncio
import os

from gesso_contracts.base import Message
from gesso_core.errors import InvalidRequest, OutOfMemory, Unavailable
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.log import configure_logging
from gesso_services.runtime.service import ServiceContext, ServiceSpec, run_service
from gesso_services.runtime.settings import ServiceSettings


class AddUp(Message):
    numbers: list[int]
    step_s: float = 0.0


class AddedUp(Message):
    total: int


class Divide(Message):
    dividend: int
    divisor: int


class Divided(Message):
    quotient: float


class WhoAmI(Message):
    pass


class ItIsMe(Message):
    pid: int


class Refuse(Message):
    how: str


async def add_up(request: AddUp, job: JobContext) -> AddedUp:
    total = 0
    for step, number in enumerate(request.numbers, start=1):
        await asyncio.sleep(request.step_s)
        total += number
        job.preview(str(total).encode(), step, "text/plain")
        job.report(step, len(request.numbers))
    return AddedUp(total=total)


async def divide(request: Divide, job: JobContext) -> Divided:
    return Divided(quotient=request.dividend / request.divisor)


async def end_the_process(request: AddUp, job: JobContext) -> AddedUp:
    os._exit(13)


async def refuse(request: Refuse, job: JobContext) -> AddedUp:
    errors = {
        "invalid": InvalidRequest("nothing to add", field="numbers"),
        "memory": OutOfMemory("too many numbers"),
        "unavailable": Unavailable("the abacus is away"),
    }
    raise errors[request.how]


async def who_am_i(request: WhoAmI, job: JobContext) -> ItIsMe:
    return ItIsMe(pid=os.getpid())


async def add(request: AddUp) -> AddedUp:
    await asyncio.sleep(request.step_s * len(request.numbers))
    return AddedUp(total=sum(request.numbers))


async def refuse_call(request: Refuse) -> AddedUp:
    return await refuse(request, JobContext("call"))


async def warm_up(context: ServiceContext) -> None:
    added = await add_up(AddUp(numbers=[1, 2]), context.trial_job())
    assert added.total == 3


def build_service(**settings: object) -> ServiceSpec:
    return ServiceSpec(
        name="diffusion",
        settings=ServiceSettings.for_service("diffusion", **settings),
        rpc={"add": add, "refuse": refuse_call},
        jobs={
            "add-up": add_up,
            "divide": divide,
            "end-the-process": end_the_process,
            "refuse-job": refuse,
            "who-am-i": who_am_i,
        },
        messages={
            "add": (AddUp, AddedUp),
            "refuse": (Refuse, AddedUp),
            "add-up": (AddUp, AddedUp),
            "divide": (Divide, Divided),
            "end-the-process": (AddUp, AddedUp),
            "refuse-job": (Refuse, AddedUp),
            "who-am-i": (WhoAmI, ItIsMe),
        },
        warm_up=warm_up,
    )


if __name__ == "__main__":
    configure_logging("diffusion")
    asyncio.run(run_service(build_service()))
