"""W3C trace context: one ``traceparent`` follows a request through HTTP, the bus and the logs."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRACEPARENT = re.compile(r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$")

_current: ContextVar[str | None] = ContextVar("gesso_traceparent", default=None)
_job: ContextVar[str | None] = ContextVar("gesso_job", default=None)


def new_trace() -> str:
    """A fresh ``traceparent`` with a random trace id and span id."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def child_of(parent: str | None) -> str:
    """A ``traceparent`` with the trace id of ``parent`` and a new span id; fresh if unreadable."""
    if parent is None or not _TRACEPARENT.match(parent):
        return new_trace()
    version, trace_id, _, flags = parent.split("-")
    return f"{version}-{trace_id}-{secrets.token_hex(8)}-{flags}"


def current_trace() -> str:
    """The ``traceparent`` of the work at hand; a fresh one outside of any."""
    return _current.get() or new_trace()


def trace_id() -> str | None:
    """The 32 hexadecimal digits that all log lines of one request share."""
    current = _current.get()
    return current.split("-")[1] if current else None


def current_job() -> str | None:
    """The id of the job at hand."""
    return _job.get()


@contextmanager
def use_trace(parent: str | None, job_id: str | None = None) -> Iterator[str]:
    """Work inside is part of the trace of ``parent``, and of the job ``job_id`` if given."""
    traceparent = child_of(parent)
    trace_token, job_token = _current.set(traceparent), _job.set(job_id or _job.get())
    try:
        yield traceparent
    finally:
        _job.reset(job_token)
        _current.reset(trace_token)
