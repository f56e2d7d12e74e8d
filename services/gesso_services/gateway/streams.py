"""Server-sent events: named, with JSON data; a comment when nothing happens; closed for sure."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from gesso_contracts import Problem
from gesso_core.errors import GessoError
from starlette.types import Send

from gesso_services.gateway.problems import error_body, http_problem
from gesso_services.runtime.problems import problem_of

T = TypeVar("T")

HEARTBEAT = KEEPALIVE_COMMENT
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
DOCUMENTED: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}


class EventStream(StreamingResponse):
    """A stream whose generator is closed when the client leaves, not when memory is collected."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], status_code: int = 200) -> None:
        super().__init__(events, status_code, headers=HEADERS)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send until the generator ends or the client has gone."""
        async with aclosing(self._events):
            await super().stream_response(send)


async def with_heartbeats(
    items: AsyncIterator[T], every_s: float
) -> AsyncGenerator[T | None, None]:
    """The items as they come, and ``None`` after every ``every_s`` seconds of silence."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(items))
            if not (await asyncio.wait({pending}, timeout=every_s))[0]:
                yield None
                continue
            done, pending = pending, None
            try:
                yield done.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()


async def result_with_heartbeats(
    work: Awaitable[T], every_s: float
) -> AsyncGenerator[T | None, None]:
    """``None`` after every ``every_s`` seconds of waiting, then the result of ``work``."""

    async def once() -> AsyncIterator[T]:
        yield await work

    async with aclosing(with_heartbeats(once(), every_s)) as beats:
        async for item in beats:
            yield item


def event(name: str | None, data: dict[str, Any] | str) -> bytes:
    """One event on the wire; ``data`` is an object, or the text itself."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return format_sse_event(event=name, data_str=text)


def failure(error: GessoError | Problem) -> bytes:
    """The last event of a stream that failed, in the shape that OpenAI's clients raise."""
    problem = error if isinstance(error, Problem) else problem_of(error)
    return event("error", error_body(http_problem(problem)).model_dump_json())


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)
