"""Every error a user can meet, in one tree.

GessoError
├── InvalidRequest        422  a field of a request is not allowed
│   └── UnreadableImage   422  the bytes are not a picture that may be opened
├── UnknownModel          404  no such model
├── NotFound              404  no such job, or a blob that has expired
├── Conflict              409  the id is taken by another request
├── ConfigError           422  a model configuration contradicts itself
├── WeightsError          422  a weight file is missing, truncated or does not fit the model
│   └── UnsafeFile        422  a pickle, or a path that leaves its folder
├── NumericalError        500  NaN or infinity where numbers were due
├── OutOfMemory           507  the work does not fit; says what would
├── Unavailable           503  a part that the work needs does not answer
│   └── Overloaded        503  too much work is waiting already
└── Cancelled             499  the job was withdrawn

A message says what was given, what is possible, and what to do next. ``assert`` is for our own
invariants.
"""

from collections.abc import Iterable, Sequence


class GessoError(Exception):
    """Base of all errors shown to users; ``status`` is the HTTP status, ``code`` is stable."""

    status = 500
    code = "internal"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(GessoError):
    """A request that can never succeed as it stands."""

    status, code = 422, "invalid_request"


class UnreadableImage(InvalidRequest):
    """Bytes that are not a picture, or one over the pixel limit."""

    code = "unreadable_image"


class UnknownModel(GessoError):
    """A model name that the registry does not have."""

    status, code = 404, "unknown_model"

    def __init__(self, name: str, known: Iterable[str], similar: Sequence[str] = ()) -> None:
        available = ", ".join(sorted(known))
        hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        super().__init__(
            f"unknown model {name[:80]!r}; available: {available}{hint}", field="model"
        )


class NotFound(GessoError):
    """A job or a blob that does not exist, or no longer."""

    status, code = 404, "not_found"


class Conflict(GessoError):
    """An id that is already taken by another request."""

    status, code = 409, "conflict"


class ConfigError(GessoError):
    """A configuration that contradicts itself."""

    status, code = 422, "invalid_config"


class WeightsError(GessoError):
    """A weight file that is missing, truncated, or does not fit the model."""

    status, code = 422, "invalid_weights"


class UnsafeFile(WeightsError):
    """A file that gesso refuses to open: a pickle, or a path outside its folder."""

    code = "unsafe_file"


class NumericalError(GessoError):
    """NaN or infinity where finite numbers were due."""

    status, code = 500, "not_finite"


class OutOfMemory(GessoError):
    """The work does not fit into memory."""

    status, code = 507, "out_of_memory"


class Unavailable(GessoError):
    """A service that the work needs does not answer."""

    status, code = 503, "unavailable"


class Overloaded(Unavailable):
    """A service whose queue is full; trying again later helps."""

    code = "overloaded"


class Cancelled(GessoError):
    """The job was withdrawn; ``after`` is the last step that was completed."""

    status, code = 499, "cancelled"

    def __init__(self, job_id: str, after: int) -> None:
        super().__init__(f"job {job_id} was cancelled after step {after}")
        self.after = after
