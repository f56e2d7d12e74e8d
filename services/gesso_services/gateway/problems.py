"""Errors as clients see them: one JSON object for OpenAI's clients and for readers of RFC 9457.

``{"error": {"message", "type", "code", "param"}, "type", "title", "status", "detail", "code", …}``
Every status has one sentence that says what was given, what is possible, and what to do next.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from gesso_contracts import Problem
from gesso_contracts.codec import shorten
from gesso_contracts.problem import MEDIA_TYPE
from gesso_core.errors import GessoError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from gesso_services.runtime.problems import problem_of

logger = logging.getLogger(__name__)

_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_SENTENCES = {
    404: "there is nothing at {method} {path}; GET /openapi.json lists every route",
    405: "{path} does not answer {method}; GET /openapi.json lists every route and its methods",
}


class OpenAIError(BaseModel):
    """The error object that OpenAI's clients read."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(Problem):
    """The body of every answer that is not a success."""

    error: OpenAIError


def error_schema() -> dict[str, Any]:
    """The JSON schema of :class:`ErrorBody`, for ``components.schemas`` of the OpenAPI document."""
    schema = ErrorBody.model_json_schema(
        mode="serialization", ref_template="#/components/schemas/{model}"
    )
    schema["properties"]["error"] = schema.pop("$defs")["OpenAIError"]
    return schema


class EdgeError(GessoError):
    """A refusal with its own status, code and headers; raised by the edge itself."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, field=field)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def error_body(problem: Problem) -> ErrorBody:
    """The problem, with OpenAI's error object beside it."""
    kind = _OPENAI_TYPES.get(
        problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"
    )
    error = OpenAIError(message=problem.detail, type=kind, code=problem.code, param=problem.field)
    return ErrorBody(error=error, **problem.model_dump())


def http_problem(problem: Problem) -> Problem:
    """The same in a status that HTTP knows: 499 (withdrawn) becomes 409."""
    return problem.model_copy(update={"status": 409}) if problem.status == 499 else problem


def make_problem(status: int, code: str, detail: str, *, field: str | None = None) -> Problem:
    """A problem whose title is its code as words."""
    return Problem(
        title=code.replace("_", " ").capitalize(),
        status=status,
        code=code,
        detail=_printable(detail)[:4000],
        field=_printable(field)[:200] if field else None,
    )


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for a problem."""
    return JSONResponse(
        error_body(problem).model_dump(mode="json"),
        status_code=problem.status,
        headers=dict(headers or {}),
        media_type=MEDIA_TYPE,
    )


def documented(*statuses: int, ok: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """The ``responses=`` of a route: ``ok`` for 200, an :class:`ErrorBody` for ``statuses``."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted(statuses)
    }
    return {200: ok, **errors} if ok else errors


def install(app: FastAPI) -> None:
    """Every error leaves the gateway through here."""
    app.add_exception_handler(GessoError, _on_gesso_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_surprise)


async def _on_gesso_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GessoError)
    headers = error.headers if isinstance(error, EdgeError) else {}
    problem = http_problem(problem_of(error))
    if problem.status == 503:
        headers = {"Retry-After": "2", **headers}
    return problem_response(problem, headers)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid" and isinstance(first["loc"][-1], int):
        sentence = f"the body is not JSON ({first['ctx']['error']} at byte {first['loc'][-1]})"
        return problem_response(make_problem(400, "invalid_json", sentence))
    place, *names = first["loc"]
    # In brackets stands which of several kinds of object was meant; that is no field.
    field = ".".join(str(name) for name in names if not str(name).startswith("<"))
    where = f"{place} field {field!r}" if field else f"the {place}"
    sentence = f"{where}: {_lower_first(first['msg'])}"
    if first["type"] != "missing":  # there, the input is all that was given beside it
        sentence += f"; given {shorten(first['input'])}"
    return problem_response(make_problem(422, "invalid_request", sentence, field=field or None))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    sentence = _SENTENCES.get(status, "{detail}").format(
        method=request.method, path=request.url.path, detail=error.detail
    )
    if status == 400:
        sentence = (
            f"{error.detail.rstrip('.')}; send UTF-8 JSON, or multipart/form-data where a file goes"
        )
    headers = {"Allow": _allowed_methods(request)} if status == 405 else error.headers
    code = HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
    return problem_response(make_problem(status, code, sentence), headers)


async def _on_surprise(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    sentence = "the gateway met an error of its own; its log says which. Trying again is safe"
    return problem_response(make_problem(500, "internal", sentence))


def _allowed_methods(request: Request) -> str:
    """Every method of the path; the router alone would name those of its first route."""
    scope = request.scope
    return ", ".join(
        method
        for method in _METHODS
        if any(
            route.matches({**scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _printable(text: str) -> str:
    """Without lone surrogates, which JSON can carry in and UTF-8 cannot carry out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
