"""The base of all messages and the few shared field types."""

import base64
import binascii
from typing import Annotated, Any, ClassVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)

from gesso_contracts import limits

TOKEN_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"


class Message(BaseModel):
    """Base of everything that travels: immutable, and a field it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    version: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """Name and version as the ``Schema`` header carries them: ``GenerateImage/1``."""
        return f"{cls.__name__}/{cls.version}"


def _bytes_from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error


def _base64_from_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _base64_schema(limit: int) -> dict[str, Any]:
    return {"type": "string", "contentEncoding": "base64", "maxLength": 4 * -(-limit // 3)}


_FROM_TEXT = BeforeValidator(_bytes_from_base64)
_TO_TEXT = PlainSerializer(_base64_from_bytes, return_type=str, when_used="json")

# Bytes in Python, standard base64 text in JSON.
InlineBytes = Annotated[
    bytes,
    Field(max_length=limits.INLINE_RPC_BYTES),
    _FROM_TEXT,
    _TO_TEXT,
    WithJsonSchema(_base64_schema(limits.INLINE_RPC_BYTES)),
]
PreviewBytes = Annotated[
    bytes,
    Field(max_length=limits.PREVIEW_BYTES),
    _FROM_TEXT,
    _TO_TEXT,
    WithJsonSchema(_base64_schema(limits.PREVIEW_BYTES)),
]

Token = Annotated[str, StringConstraints(pattern=TOKEN_PATTERN)]
"""One token of a subject: lower case letters, digits and dashes, at most 64."""

JobId = Token
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ModelName = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=limits.MODEL_NAME_CHARS,
        pattern=r"^[A-Za-z0-9]+([._/-][A-Za-z0-9]+)*$",
    ),
]
MediaType = Annotated[str, StringConstraints(pattern=r"^[a-z]+/[a-z0-9.+-]+$", max_length=100)]
Side = Annotated[
    int, Field(ge=limits.MIN_SIDE, le=limits.MAX_SIDE, multiple_of=limits.SIDE_MULTIPLE)
]
Prompt = Annotated[
    str, StringConstraints(min_length=1, max_length=limits.PROMPT_CHARS, pattern=r"\S")
]
LoraStrength = Annotated[
    float,
    Field(ge=-limits.MAX_LORA_STRENGTH, le=limits.MAX_LORA_STRENGTH, allow_inf_nan=False),
]
Timestamp = AwareDatetime
