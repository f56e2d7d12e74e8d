"""Jobs: what is submitted, what state they are in, what is told while they run.

The life of a job is the table ``TRANSITIONS``; a state without successors is final.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from gesso_contracts import limits
from gesso_contracts.base import JobId, MediaType, Message, PreviewBytes, Sha256, Timestamp, Token
from gesso_contracts.problem import Problem

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    "queued": frozenset({"queued", "running", "failed", "cancelled"}),
    "running": frozenset({"running", "queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


class Job(Message):
    """One piece of work as it lies in the queue."""

    id: JobId
    service: Token
    kind: Token
    request_schema: str = Field(pattern=r"^[A-Z][A-Za-z]*/[1-9][0-9]*$", max_length=80)
    request: dict[str, JsonValue]
    submitted_at: Timestamp


class JobState(Message):
    """What is known about a job; kept in the ``jobs`` bucket, so a late subscriber can read it."""

    id: JobId
    service: Token
    kind: Token
    status: JobStatus
    progress: float = Field(default=0.0, ge=0, le=1)
    step: int = Field(default=0, ge=0)
    total_steps: int = Field(default=0, ge=0, description="0 until the first step was reported")
    attempt: int = Field(default=0, ge=0, description="how often a worker has started it")
    created_at: Timestamp
    updated_at: Timestamp
    started_at: Timestamp | None = None
    request_sha256: Sha256
    queue_sequence: int | None = Field(
        default=None, ge=1, description="place in the queue, once started"
    )
    result_schema: str | None = Field(default=None, max_length=80)
    result: dict[str, JsonValue] | None = None
    problem: Problem | None = None
    cancel_requested: bool = False

    @property
    def is_final(self) -> bool:
        """Will this state never change again?"""
        return not TRANSITIONS[self.status]


class JobList(Message):
    """One page of jobs, last changed first; give ``cursor`` back for the next page."""

    jobs: list[JobState] = Field(max_length=limits.MAX_LIST)
    cursor: str | None = None


class JobProgress(Message):
    """One step is done."""

    event: Literal["progress"] = "progress"
    job_id: JobId
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    progress: float = Field(ge=0, le=1)


class JobPreview(Message):
    """What the picture looks like so far."""

    event: Literal["preview"] = "preview"
    job_id: JobId
    step: int = Field(ge=0)
    image: PreviewBytes = Field(repr=False)
    media_type: MediaType = "image/webp"


class JobText(Message):
    """The answer so far, from its beginning: a late or lost event leaves no hole."""

    event: Literal["text"] = "text"
    job_id: JobId
    text: str = Field(max_length=limits.ANSWER_CHARS)


class JobStateChanged(Message):
    """The job entered another state."""

    event: Literal["state"] = "state"
    state: JobState


JobEvent = Annotated[
    JobProgress | JobPreview | JobText | JobStateChanged, Field(discriminator="event")
]


class CancelJob(Message):
    """Stop at the next step."""

    job_id: JobId


class DeadLetter(Message):
    """A job that could not be worked on, kept for a person to look at."""

    job: Job
    deliveries: int = Field(ge=1)
    reason: str = Field(max_length=limits.DETAIL_CHARS)
    buried_at: Timestamp
