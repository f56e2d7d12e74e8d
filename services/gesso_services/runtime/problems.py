"""Errors to problems and back, so that an error keeps its class on its way over the bus."""

from collections.abc import Iterator

from gesso_contracts import limits
from gesso_contracts.codec import ContractError
from gesso_contracts.problem import Problem
from gesso_core.errors import GessoError, InvalidRequest


def _classes(base: type[GessoError] = GessoError) -> Iterator[type[GessoError]]:
    yield base
    for child in base.__subclasses__():
        yield from _classes(child)


def problem_of(error: BaseException) -> Problem:
    """What a user may read about ``error``; an unknown error is named by its class only."""
    if isinstance(error, ContractError):
        error = InvalidRequest(str(error), field=error.field)
    if not isinstance(error, GessoError):
        return Problem(
            title="Internal error",
            status=500,
            code="internal",
            detail=f"{type(error).__name__} inside the service; its log has the details",
        )
    return Problem(
        title=_title(error.code),
        status=error.status,
        code=error.code,
        detail=error.message[: limits.DETAIL_CHARS],
        field=error.field,
    )


def error_of(problem: Problem) -> GessoError:
    """The error that ``problem`` was made from: same class, message and field."""
    cls = next((cls for cls in _classes() if cls.code == problem.code), GessoError)
    error = cls.__new__(cls)
    GessoError.__init__(error, problem.detail, field=problem.field)
    if error.code != problem.code or error.status != problem.status:
        error.code, error.status = problem.code, problem.status
    return error


def _title(code: str) -> str:
    return code.replace("_", " ").capitalize()
