"""The AsyncAPI document is what the messages say, and it holds together."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from gesso_contracts import GenerateImage, asyncapi, encode, operations

FILE = Path(__file__).parents[2] / "docs" / "asyncapi.json"

# The parts of the AsyncAPI 3.0 schema that this document uses.
REFERENCE = {
    "type": "object",
    "required": ["$ref"],
    "additionalProperties": False,
    "properties": {"$ref": {"type": "string", "pattern": "^#/"}},
}
NAME = r"^[A-Za-z0-9._-]+$"
STRUCTURE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["asyncapi", "info", "channels", "operations", "components"],
    "additionalProperties": False,
    "properties": {
        "asyncapi": {"const": "3.0.0"},
        "defaultContentType": {"type": "string"},
        "info": {
            "type": "object",
            "required": ["title", "version"],
            "properties": {"title": {"type": "string"}, "version": {"type": "string"}},
        },
        "servers": {
            "additionalProperties": {"type": "object", "required": ["host", "protocol"]},
        },
        "channels": {
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {
                "type": "object",
                "required": ["address", "messages"],
                "additionalProperties": False,
                "properties": {
                    "address": {"type": ["string", "null"]},
                    "messages": {"additionalProperties": REFERENCE, "minProperties": 1},
                    "parameters": {"type": "object"},
                },
            },
        },
        "operations": {
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {
                "type": "object",
                "required": ["action", "channel", "messages"],
                "additionalProperties": False,
                "properties": {
                    "action": {"enum": ["send", "receive"]},
                    "channel": REFERENCE,
                    "summary": {"type": "string"},
                    "messages": {"type": "array", "items": REFERENCE, "minItems": 1},
                    "reply": {
                        "type": "object",
                        "required": ["channel", "messages", "address"],
                        "properties": {
                            "channel": REFERENCE,
                            "messages": {"type": "array", "items": REFERENCE},
                            "address": {"type": "object", "required": ["location"]},
                        },
                    },
                },
            },
        },
        "components": {
            "type": "object",
            "properties": {
                "messages": {
                    "propertyNames": {"pattern": NAME},
                    "additionalProperties": {
                        "type": "object",
                        "required": ["name", "payload", "headers", "contentType"],
                    },
                },
                "schemas": {"propertyNames": {"pattern": NAME}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(asyncapi.text())
    return loaded


def test_the_file_in_docs_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == asyncapi.text(), (
        "run: python -m gesso_contracts.asyncapi docs/asyncapi.json"
    )


def test_the_document_has_the_structure_of_asyncapi_3(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(STRUCTURE).validate(document)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in references(document):
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in found, reference
            found = found[part]


def test_every_operation_of_the_table_is_there(document: dict[str, Any]) -> None:
    for service, verbs in operations.RPC.items():
        for verb in verbs:
            assert f"rpc.{service}.{verb}" in document["operations"]
    for service, kinds in operations.JOBS.items():
        for kind in kinds:
            assert f"job.{service}.{kind}" in document["operations"]


def test_the_schemas_carry_the_limits_and_accept_a_real_message(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["GenerateImage"]
    assert schema["properties"]["prompt"]["maxLength"] == 4000
    assert schema["properties"]["width"]["multipleOf"] == 8
    assert schema["additionalProperties"] is False
    message = GenerateImage(model="sana-tiny", prompt="a cat", width=64, height=64, seed=1)
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(json.loads(encode(message)[0]))


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)
