"""What the two clients share: options in, events and answers out, and the errors between."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from gesso_contracts import JobEvent
from gesso_contracts.limits import MIB
from gesso_core.errors import GessoError, InvalidRequest, Unavailable
from pydantic import TypeAdapter

DEFAULT_URL = "http://127.0.0.1:8080"
MAX_EVENT_BYTES = 128 * MIB
DONE = "[DONE]"  # how a stream of words ends
_EVENT: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)
Json = dict[str, Any]


class ApiError(GessoError):
    """The server refused or failed; ``status``, ``code`` and ``field`` are the server's."""

    def __init__(self, status: int, code: str, message: str, *, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.status, self.code = status, code


class NotReachable(Unavailable):
    """Nothing answers at the URL, or the connection broke."""

    code = "not_reachable"


@dataclass(frozen=True)
class Picture:
    """A finished picture; ``metadata`` says what made it, ``score`` what a judge says of it."""

    data: bytes = field(repr=False)
    output_format: str
    seed: int
    job_id: str
    metadata: Json = field(repr=False)
    score: float | None = None

    def save(self, path: str | Path) -> Path:
        """Write the file and return where it is."""
        Path(path).write_bytes(self.data)
        return Path(path)


@dataclass(frozen=True)
class Progress:
    """One step of one picture is done; ``preview`` has the picture so far when there is one."""

    index: int
    step: int
    total_steps: int
    progress: float
    preview: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Reconstruction:
    """A picture after encoder and decoder, and how close it stayed."""

    data: bytes = field(repr=False)
    output_format: str
    psnr_db: float
    ssim: float


OnProgress = Callable[[Progress], None]


def options(base_url: str, api_key: str | None, timeout: float) -> Json:
    """How to open a connection to ``base_url``; ``timeout`` is in seconds of silence."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    waits = httpx2.Timeout(timeout, connect=5.0)
    with reachable(base_url):
        httpx2.URL(base_url)
    return {"base_url": base_url, "headers": headers, "timeout": waits}


def generation(prompt: str, wanted: Json) -> Json:
    """The streaming request for ``prompt``; what is None is left to the server. ``loras`` may be a
    mapping of names to strengths, or names alone.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    if "loras" in given:
        given["loras"] = loras(given["loras"])
    return {"prompt": prompt, **given, "stream": True, "response_format": "b64_json"}


def variation(image: bytes, prompt: str | None, wanted: Json) -> Json:
    """The streaming request for variations of a picture, as a form."""
    given = {"prompt": prompt, **wanted, "stream": "true", "response_format": "b64_json"}
    fields = {name: str(value) for name, value in given.items() if value is not None}
    return {"files": _file(image), "data": fields}


def loras(wanted: str | Mapping[str, float] | Iterable[str | Json]) -> list[Json]:
    """LoRAs as the server takes them; one may be its name alone."""
    if isinstance(wanted, str):
        wanted = [wanted]
    if isinstance(wanted, Mapping):
        return [{"name": name, "strength": strength} for name, strength in wanted.items()]
    return [{"name": use} if isinstance(use, str) else dict(use) for use in wanted]


def take(event: Json, pictures: dict[int, Picture], on_progress: OnProgress | None) -> None:
    """Sort one event of a generation: progress to the callback, a finished picture to its place,
    which is its rank where a judge has chosen.
    """
    index: int = event.get("index", 0)
    if event["type"] == "image_generation.completed":
        place: int = event.get("rank", index)
        pictures[place] = Picture(
            data=base64.b64decode(event["b64_json"]),
            output_format=event["output_format"],
            seed=event["seed"],
            job_id=event["job_id"],
            metadata=event["metadata"],
            score=event.get("score"),
        )
    elif on_progress is not None:
        preview = base64.b64decode(event["b64_json"]) if "b64_json" in event else None
        on_progress(
            Progress(index, event["step"], event["total_steps"], event["progress"], preview)
        )


def complete(pictures: dict[int, Picture], body: Json) -> list[Picture]:
    """All pictures in order; a stream that ended early is an error."""
    wanted = int(body.get("n") or 1)
    if len(pictures) != wanted:
        raise NotReachable(
            f"the server closed the stream after {len(pictures)} of {wanted} pictures; try again"
        )
    return [pictures[index] for index in range(wanted)]


def upload(image: bytes, model: str | None, output_format: str) -> Json:
    """A multipart upload of one picture."""
    fields = {"output_format": output_format} | ({"model": model} if model else {})
    return {"files": _file(image), "data": fields}


def reconstruction(answer: Json) -> Reconstruction:
    """The answer of ``POST /v1/images/reconstructions``."""
    return Reconstruction(
        data=base64.b64decode(answer["b64_json"]),
        output_format=answer["output_format"],
        psnr_db=answer["psnr_db"],
        ssim=answer["ssim"],
    )


def event(value: Json) -> JobEvent:
    """One event of ``GET /v1/jobs/{id}/events``."""
    return _EVENT.validate_python(value)


def checked(data: str) -> Json:
    """The data of one server-sent event; an ``error`` event raises what it carries."""
    value: Json = json.loads(data)
    if "error" in value:
        raise_problem(int(value.get("status", 500)), value)
    return value


def segment(job_id: str) -> str:
    """A job id as one segment of a path."""
    if not job_id.strip("."):
        raise InvalidRequest(f"{job_id!r} is not a job id", field="job_id")
    return quote(job_id, safe="")


def query(**values: Any) -> Json:
    """Query parameters without those that are None."""
    return {name: value for name, value in values.items() if value is not None}


def as_json(answer: httpx2.Response, *, also: tuple[int, ...] = ()) -> Json:
    """The JSON object of a success, or of a status in ``also``."""
    if answer.status_code not in also:
        raise_for_status(answer)
    value: Json = answer.json()
    return value


def raise_for_status(answer: httpx2.Response) -> None:
    """Raise ApiError with the server's own sentence unless the answer is a success."""
    if answer.is_success:
        return
    try:
        body = answer.json()
    except ValueError:
        body = None
    raise_problem(answer.status_code, body if isinstance(body, dict) else {})


def raise_problem(status: int, body: Json) -> None:
    """Raise ApiError from an error body of the gateway."""
    sentence = body.get("detail") or f"the server answered {status} without an explanation"
    raise ApiError(status, body.get("code", "unknown"), sentence, field=body.get("field"))


def _file(image: bytes) -> Json:
    return {"image": ("image", image, "application/octet-stream")}


@contextmanager
def reachable(url: httpx2.URL | str) -> Iterator[None]:
    """Turn every failure of the connection into one sentence."""
    try:
        yield
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise NotReachable(
            f"no gesso server answers at {url} ({reason}); start one with `gesso up`, or give its "
            "address with --url or GESSO_URL"
        ) from error
