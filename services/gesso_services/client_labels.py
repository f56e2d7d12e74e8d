"""What the two clients share of annotation: pictures, words and prompts out, labels in."""

import json
from collections.abc import Sequence
from typing import Any

from gesso_contracts import JobState

from gesso_services.client_wire import ApiError, Json, NotReachable, segment

TEXT = "/v1/annotations/text"
CARS = "/v1/annotations/cars"
SEGMENT = "/v1/annotations/segment"
DRAW = "/v1/annotations/draw"
KEY = "Idempotency-Key"


class JobFailed(ApiError):
    """The job itself has failed or was cancelled; asking for its result again changes nothing."""


def text_form(image: bytes, words: Sequence[Json] | None, name: str, options: Json) -> Json:
    """The request for a text job; what is None is left to the server."""
    fields = {"words": words, **options, "wait": False}
    return {"files": {"image": _file(name, image)}, "data": _fields(fields)}


def cars_form(
    image: bytes,
    calibration: str,
    prompts: Sequence[Json],
    points: bytes | None,
    name: str,
    options: Json,
) -> Json:
    """The request for a job about cars."""
    files = {
        "image": _file(name, image),
        "calibration": ("calib.txt", calibration.encode(), "text/plain"),
    }
    if points is not None:
        files["points"] = ("points.bin", points, "application/octet-stream")
    fields = {"prompts": list(prompts), **options, "wait": False}
    return {"files": files, "data": _fields(fields)}


def segment_form(image: bytes, prompts: Sequence[Json], options: Json) -> Json:
    """The request for masks."""
    fields = {"prompts": list(prompts), **options}
    return {"files": {"image": _file("image", image)}, "data": _fields(fields)}


def draw_request(prompt: str, words: Sequence[str], options: Json) -> Json:
    """The request for signs that are drawn and labelled; what is None is left to the server."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"prompt": prompt, "words": list(words), **given, "wait": False}


def drawing_path(job_id: str, part: str, picture: int | None) -> str:
    """Where a file of an annotation is; of one that made several pictures, which of them."""
    between = "" if picture is None else f"pictures/{picture}/"
    return f"/v1/annotations/{segment(job_id)}/{between}{segment(part)}"


def keyed(key: str | None) -> Json:
    """The header under which the same request again is the same job."""
    return {} if key is None else {"headers": {KEY: key}}


def checked_state(state: JobState | None) -> JobState:
    """A job that has succeeded; raises what it failed with."""
    if state is None or not state.is_final:
        raise NotReachable("the server closed the stream before the job ended; try again")
    if state.problem is not None:
        problem = state.problem
        raise JobFailed(problem.status, problem.code, problem.detail, field=problem.field)
    if state.status != "succeeded":
        raise JobFailed(409, "cancelled", f"job {state.id} was cancelled")
    return state


def _file(name: str, data: bytes) -> tuple[str, bytes, str]:
    return name, data, "application/octet-stream"


def _fields(given: dict[str, Any]) -> dict[str, str]:
    """Fields of a form; lists and truth values as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in given.items()
        if value is not None
    }
