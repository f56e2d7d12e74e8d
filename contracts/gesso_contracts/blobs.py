"""How bytes travel: inline while they are small, as a reference to a blob when they are not."""

from typing import Annotated, Literal

from pydantic import Field

from gesso_contracts import limits
from gesso_contracts.base import InlineBytes, MediaType, Message, Sha256, Token

SAFETENSORS = "application/safetensors"


class Inline(Message):
    """Bytes inside the message; tensors as the bytes of a safetensors file."""

    kind: Literal["inline"] = "inline"
    data: InlineBytes = Field(repr=False)
    media_type: MediaType
    dtype: str | None = Field(default=None, max_length=20)
    shape: tuple[int, ...] | None = None


class BlobRef(Message):
    """Where to find bytes that are too large for a message. ``key`` is the SHA-256 of the bytes."""

    kind: Literal["blob"] = "blob"
    bucket: Token = "blobs"
    key: Sha256
    size: int = Field(ge=0, le=limits.BLOB_BYTES, description="bytes")
    sha256: Sha256
    media_type: MediaType
    dtype: str | None = Field(default=None, max_length=20)
    shape: tuple[int, ...] | None = None


Payload = Annotated[Inline | BlobRef, Field(discriminator="kind")]
