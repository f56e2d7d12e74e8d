"""Names of the headers that gesso reads and writes on the bus."""

from typing import Final

SCHEMA: Final = "Schema"
CONTENT_TYPE: Final = "Content-Type"
JSON: Final = "application/json"
TRACEPARENT: Final = "traceparent"
DEADLINE: Final = "Deadline"  # seconds the caller will still wait, a decimal number
MESSAGE_ID: Final = "Nats-Msg-Id"  # the broker drops a second message with the same id
ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
