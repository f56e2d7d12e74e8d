"""Every subject of the bus is built here and nowhere else.

Tokens are lower case letters, digits and dashes; identifiers come last, so that a wildcard or a
permission can stop before them.
"""

import re
from typing import Literal

from gesso_contracts.base import TOKEN_PATTERN

PREFIX = "gesso.v1"
EventName = Literal["state", "progress", "preview", "text"]

STREAM_JOBS = "JOBS"
STREAM_DEAD_LETTERS = "DLQ"
STREAM_BLOBS = "BLOBS"
BUCKET_JOBS = "jobs"

ALL_JOBS = f"{PREFIX}.job.>"
ALL_DEAD_LETTERS = f"{PREFIX}.dlq.>"
ALL_BLOBS = f"{PREFIX}.blob.>"

_TOKEN = re.compile(TOKEN_PATTERN.removesuffix("$") + r"\Z")


def token(value: str) -> str:
    """``value`` itself when it may stand in a subject, otherwise ``ValueError``."""
    if not _TOKEN.match(value):
        raise ValueError(
            f"{value!r} cannot stand in a subject; use 1 to 64 lower case letters, digits and "
            "dashes, the first not a dash"
        )
    return value


def rpc(service: str, verb: str) -> str:
    """``gesso.v1.rpc.<service>.<verb>``: a short call, answered by one replica."""
    return f"{PREFIX}.rpc.{token(service)}.{token(verb)}"


def job(service: str, kind: str) -> str:
    """``gesso.v1.job.<service>.<kind>``: the work queue."""
    return f"{PREFIX}.job.{token(service)}.{token(kind)}"


def all_jobs(service: str) -> str:
    """Every kind of job of one service."""
    return f"{PREFIX}.job.{token(service)}.>"


def event(job_id: str, what: EventName) -> str:
    """``gesso.v1.evt.job.<job_id>.<what>``: told while a job runs."""
    return f"{PREFIX}.evt.job.{token(job_id)}.{what}"


def all_events(job_id: str) -> str:
    """Every event of one job."""
    return f"{PREFIX}.evt.job.{token(job_id)}.*"


def cancel(service: str) -> str:
    """``gesso.v1.ctl.<service>.cancel``: heard by every replica of the service."""
    return f"{PREFIX}.ctl.{token(service)}.cancel"


def dead_letter(service: str) -> str:
    """``gesso.v1.dlq.<service>``: jobs that could not be worked on."""
    return f"{PREFIX}.dlq.{token(service)}"


def blob_chunk(key: str, index: int) -> str:
    """``gesso.v1.blob.<key>.<n>``: one chunk of a blob, ``index`` from 0."""
    if index < 0:
        raise ValueError(f"chunk index {index} is negative")
    return f"{PREFIX}.blob.{token(key)}.{index}"


def blob(key: str) -> str:
    """Every chunk of one blob."""
    return f"{PREFIX}.blob.{token(key)}.*"
