"""One line per record, with the service, the job and the trace it belongs to."""

import json
import logging
import sys
from datetime import UTC, datetime

from gesso_services.runtime import trace
from gesso_services.runtime.settings import LogSettings


class LineFormatter(logging.Formatter):
    """``time level logger message service=… job=… trace=…``, or the same as one JSON object."""

    def __init__(self, service: str, *, as_json: bool) -> None:
        super().__init__()
        self.service = service
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message and the exception contain."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        context = {"service": self.service, "job": trace.current_job(), "trace": trace.trace_id()}
        known = {key: value for key, value in context.items() if value}
        if self.as_json:
            line = {"time": when, "level": record.levelname.lower(), "logger": record.name}
            return json.dumps({**line, "message": message, **known})
        tail = " ".join(f"{key}={value}" for key, value in known.items())
        flat = message.replace("\n", " | ")
        return f"{when} {record.levelname.lower():7} {record.name} {flat} {tail}"


def configure_logging(service: str, settings: LogSettings | None = None) -> None:
    """Send what gesso logs to standard error, one line per record."""
    settings = settings or LogSettings()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(service, as_json=settings.format == "json"))
    root = logging.getLogger("gesso_services")
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    root.propagate = False
