"""Bounded memory: work comes in while there is room, and waits in its order of arrival otherwise.

Keys and values of every picture and answer under way are kept until it is done, so it is known at
the door how many bytes it will fill. Whoever comes first is let in first, however small those
behind it are; so nothing waits for ever.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gesso_core.errors import Cancelled, OutOfMemory

from gesso_services.runtime.job_context import JobContext


@dataclass(eq=False)
class _Waiting:
    need: int
    admitted: "asyncio.Future[None]"


class Room:
    """``capacity`` bytes that pieces of work share; used from one event loop.

    ``setting`` names the variable that sets the capacity, for the advice in an error.
    """

    def __init__(self, capacity: int, *, setting: str) -> None:
        self.capacity = capacity
        self.setting = setting
        self._used = 0
        self._waiting: deque[_Waiting] = deque()

    @property
    def used(self) -> int:
        """Bytes that are given away."""
        return self._used

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def reserved(self, need: int, job: JobContext, *, what: str) -> AsyncIterator[None]:
        """``need`` bytes for as long as the context lasts; waits until they are free.

        Raises:
            OutOfMemory: more than the whole room; ``what`` would need them.
            Cancelled: the job was withdrawn while it waited.
        """
        if need > self.capacity:
            raise OutOfMemory(
                f"{what} fills {_megabytes(need)} with keys and values, this service has "
                f"{_megabytes(self.capacity)}; ask for less at once, or start it with "
                f"{self.setting} of at least {need}"
            )
        await self._admitted(need, job)
        try:
            yield
        finally:
            self._used -= need
            self._let_in()

    async def _admitted(self, need: int, job: JobContext) -> None:
        """Return once ``need`` bytes are ours; nothing is ours when this raises."""
        loop = asyncio.get_running_loop()
        place = _Waiting(need, loop.create_future())
        self._waiting.append(place)
        self._let_in()
        withdrawn = asyncio.ensure_future(job.wait_cancelled())
        try:
            await asyncio.wait({place.admitted, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
            if job.cancelled:
                raise Cancelled(job.id, after=job.step)
        except BaseException:
            self._leave(place)
            raise
        finally:
            withdrawn.cancel()

    def _leave(self, place: _Waiting) -> None:
        if place.admitted.done():
            self._used -= place.need
        else:
            self._waiting.remove(place)
            place.admitted.cancel()
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._used + self._waiting[0].need <= self.capacity:
            place = self._waiting.popleft()
            self._used += place.need
            place.admitted.set_result(None)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count} bytes"
