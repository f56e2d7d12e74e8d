"""Messages to bytes and back. The ``Schema`` header says what the bytes are; nothing is guessed."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from gesso_contracts import headers
from gesso_contracts.base import Message

M = TypeVar("M", bound=Message)


class ContractError(ValueError):
    """Bytes that are not the message they should be; ``field`` names the first wrong field."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def encode(message: Message) -> tuple[bytes, dict[str, str]]:
    """JSON bytes, and the headers that name the schema and the content type."""
    return message.__pydantic_serializer__.to_json(message), {
        headers.SCHEMA: message.schema_name(),
        headers.CONTENT_TYPE: headers.JSON,
    }


def decode(data: bytes, header: Mapping[str, str] | None, expected: type[M]) -> M:
    """The message in ``data``, which must be exactly ``expected`` in name and version."""
    schema = (header or {}).get(headers.SCHEMA)
    if schema != expected.schema_name():
        given = f"schema {schema!r}" if schema else f"no {headers.SCHEMA} header"
        raise ContractError(f"{given}; expected {expected.schema_name()!r}")
    content_type = (header or {}).get(headers.CONTENT_TYPE, headers.JSON)
    if content_type != headers.JSON:
        raise ContractError(f"content type {content_type!r}; expected {headers.JSON!r}")
    return parse(data, expected)


def parse(data: bytes | str, expected: type[M]) -> M:
    """The message in the JSON text ``data``; a wrong field is named in the error."""
    try:
        return expected.model_validate_json(data)
    except ValidationError as error:
        raise contract_error(error, expected.schema_name()) from error


def contract_error(error: ValidationError, schema: str) -> ContractError:
    """The first finding of pydantic as one sentence: field, value given, what is allowed."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    given = shorten(first["input"])
    where = f"{schema} field {field!r}" if field else schema
    return ContractError(f"{where}: {first['msg']}; given {given}", field=field)


def shorten(value: object, limit: int = 80) -> str:
    """``repr(value)``, cut so that an error never carries a whole picture."""
    text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"
