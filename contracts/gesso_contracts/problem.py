"""What went wrong, as RFC 9457 problem details; the same object in HTTP, RPC and jobs."""

from pydantic import Field

from gesso_contracts import limits
from gesso_contracts.base import Message

MEDIA_TYPE = "application/problem+json"


class Problem(Message):
    """``code`` is stable and meant for programs, ``detail`` is one sentence meant for people."""

    type: str = Field(default="about:blank", max_length=200)
    title: str = Field(max_length=200)
    status: int = Field(ge=400, le=599)
    code: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)
    detail: str = Field(max_length=limits.DETAIL_CHARS)
    field: str | None = Field(
        default=None, max_length=200, description="which field of the request"
    )
    allowed: list[str] | None = Field(
        default=None, description="the values that would have been accepted"
    )
