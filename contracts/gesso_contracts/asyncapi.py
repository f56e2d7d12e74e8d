"""The AsyncAPI 3.0 document of the bus, made from the message types.

``python -m gesso_contracts.asyncapi docs/asyncapi.json`` writes it; a test compares that file with
what this module makes, so the two cannot drift apart.
"""

import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from gesso_contracts import headers, jobs, operations, subjects
from gesso_contracts.base import TOKEN_PATTERN, Message
from gesso_contracts.problem import MEDIA_TYPE, Problem

Document = dict[str, Any]

EVENTS: dict[subjects.EventName, type[Message]] = {
    "state": jobs.JobStateChanged,
    "progress": jobs.JobProgress,
    "preview": jobs.JobPreview,
    "text": jobs.JobText,
}


def document() -> Document:
    """The whole document as plain data."""
    channels, actions = _rpc()
    for more_channels, more_actions in (_jobs(), _events(), _control()):
        channels |= more_channels
        actions |= more_actions
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "gesso bus",
            "version": version("gesso"),
            "description": (
                "What travels over NATS between the parts of gesso. Calls are request and reply; "
                "jobs are a JetStream work queue; events are plain messages. Every message carries "
                "its name and version in the header `Schema`."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": headers.JSON,
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "the broker; one role per service, see nats.conf",
                "security": [{"$ref": "#/components/securitySchemes/role"}],
            }
        },
        "channels": channels,
        "operations": actions,
        "components": _components(),
    }


def _rpc() -> tuple[Document, Document]:
    channels: Document = {}
    actions: Document = {}
    for service, verbs in operations.RPC.items():
        for verb, operation in verbs.items():
            name = f"rpc.{service}.{verb}"
            replies = (operation.reply, Problem)
            channels[name] = _channel(subjects.rpc(service, verb), [operation.request])
            channels[f"{name}.reply"] = _channel(None, replies)
            actions[name] = {
                **_action("receive", name, [operation.request], operation.summary),
                "reply": {
                    "channel": {"$ref": f"#/channels/{name}.reply"},
                    "messages": _references(f"{name}.reply", replies),
                    "address": {"location": "$message.header#/reply"},
                },
            }
    return channels, actions


def _jobs() -> tuple[Document, Document]:
    channels: Document = {}
    actions: Document = {}
    for service, kinds in operations.JOBS.items():
        for kind, operation in kinds.items():
            name = f"job.{service}.{kind}"
            channels[name] = _channel(subjects.job(service, kind), [jobs.Job])
            about = (
                f"{operation.summary} `request` is {operation.request.schema_name()}, the result "
                f"in the job's state is {operation.reply.schema_name()}."
            )
            actions[name] = _action("receive", name, [jobs.Job], about)
        dead = f"dlq.{service}"
        channels[dead] = _channel(subjects.dead_letter(service), [jobs.DeadLetter])
        actions[dead] = _action("send", dead, [jobs.DeadLetter], "A job nobody could work on.")
    return channels, actions


def _events() -> tuple[Document, Document]:
    channels: Document = {}
    actions: Document = {}
    for what, model in EVENTS.items():
        name = f"evt.job.{what}"
        address = subjects.event("job-id", what).replace("job-id", "{job_id}")
        channels[name] = {
            **_channel(address, [model]),
            "parameters": {"job_id": {"description": f"the id of the job, {TOKEN_PATTERN}"}},
        }
        actions[name] = _action("send", name, [model], str(model.__doc__))
    return channels, actions


def _control() -> tuple[Document, Document]:
    channels: Document = {}
    actions: Document = {}
    for service in operations.JOBS:
        name = f"ctl.{service}.cancel"
        channels[name] = _channel(subjects.cancel(service), [jobs.CancelJob])
        actions[name] = _action("receive", name, [jobs.CancelJob], str(jobs.CancelJob.__doc__))
    return channels, actions


def _channel(address: str | None, models: Iterable[type[Message]]) -> Document:
    return {
        "address": address,
        "messages": {
            model.__name__: {"$ref": f"#/components/messages/{model.__name__}"} for model in models
        },
    }


def _action(action: str, channel: str, models: Iterable[type[Message]], summary: str) -> Document:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": _references(channel, models),
    }


def _references(channel: str, models: Iterable[type[Message]]) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/{channel}/messages/{model.__name__}"} for model in models]


def _components() -> Document:
    models = sorted(all_messages(), key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "messages": {model.__name__: _message(model) for model in models},
        "schemas": definitions["$defs"],
        "securitySchemes": {
            "role": {"type": "userPassword", "description": "user is the role, see nats.conf"}
        },
    }


def _message(model: type[Message]) -> Document:
    return {
        "name": model.schema_name(),
        "summary": str(model.__doc__).splitlines()[0],
        "contentType": MEDIA_TYPE if model is Problem else headers.JSON,
        "headers": {
            "type": "object",
            "required": [headers.SCHEMA],
            "properties": {
                headers.SCHEMA: {"const": model.schema_name()},
                headers.TRACEPARENT: {"type": "string"},
            },
        },
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
    }


def all_messages() -> set[type[Message]]:
    """Every message that travels on some subject."""
    tables = [*operations.RPC.values(), *operations.JOBS.values()]
    asked = {
        model
        for table in tables
        for operation in table.values()
        for model in (operation.request, operation.reply)
    }
    told: set[type[Message]] = {
        jobs.Job,
        jobs.JobState,
        jobs.CancelJob,
        jobs.DeadLetter,
        Problem,
        *EVENTS.values(),
    }
    return asked | told


def text() -> str:
    """The document as the file holds it."""
    return json.dumps(document(), indent=2, ensure_ascii=False, sort_keys=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
