"""What the two clients share of talk and videos: requests out, words, scores and videos in."""

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gesso_contracts import JobEvent, JobPreview, JobStateChanged, JobText

from gesso_services.client_wire import Json, NotReachable, OnProgress, Progress

CHAT = "/v1/chat/completions"
JUDGEMENTS = "/v1/judgements"
VIDEOS = "/v1/videos"
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What the model said; ``length`` means that it was cut at ``max_tokens``."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Video:
    """A finished video."""

    data: bytes = field(repr=False)
    seed: int
    model: str
    size: str
    seconds: float
    job_id: str

    def save(self, path: str | Path) -> Path:
        """Write the file and return where it is."""
        Path(path).write_bytes(self.data)
        return Path(path)


def question(words: str, shown: Iterable[bytes]) -> list[Json]:
    """One message that shows pictures and videos (their files' bytes) and asks about them."""
    return [{"role": "user", "content": [*map(_part, shown), {"type": "text", "text": words}]}]


def conversation(messages: Sequence[Json], options: Json) -> Json:
    """The streaming request for an answer; what is None is left to the server."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"messages": list(messages), **_given(options), **stream}


def words(chunk: Json) -> str:
    """The words that one chunk of a stream adds."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


class Listener:
    """Puts an answer together from its chunks, and passes the words on as they come."""

    def __init__(self, on_text: OnText | None) -> None:
        self._on_text = on_text
        self._said: list[str] = []
        self._model, self._finish_reason = "", ""
        self._usage: Json | None = None

    def take(self, chunk: Json) -> None:
        """One chunk of the stream."""
        new = words(chunk)
        if new:
            self._said.append(new)
            if self._on_text is not None:
                self._on_text(new)
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        self._model, self._usage = chunk["model"], chunk.get("usage") or self._usage

    def answer(self) -> Answer:
        """The whole answer; a stream that ended early is an error."""
        if not self._finish_reason or self._usage is None:
            raise NotReachable("the server closed the stream before the answer ended; try again")
        return Answer(
            text="".join(self._said),
            finish_reason=self._finish_reason,
            model=self._model,
            prompt_tokens=self._usage["prompt_tokens"],
            answer_tokens=self._usage["completion_tokens"],
        )


def judgement(prompt: str, images: Iterable[bytes], model: str | None) -> Json:
    """The request for scores."""
    return _given(
        {"prompt": prompt, "images": [_base64(image) for image in images], "model": model}
    )


def video_request(prompt: str, options: Json) -> Json:
    """The request for a video; what is None is left to the server."""
    return {"prompt": prompt, **_given(options)}


class Watcher:
    """Passes on progress and previews of the one job that is followed."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._at = Progress(0, 0, 0, 0.0)

    def take(self, event: JobEvent) -> None:
        """One event of the job; a preview comes with the progress that was told last."""
        if self._on_progress is None or isinstance(event, JobText):
            return
        if isinstance(event, JobPreview):
            self._on_progress(replace(self._at, preview=event.image))
            return
        at = event.state if isinstance(event, JobStateChanged) else event
        self._at = Progress(0, at.step, at.total_steps, at.progress)
        self._on_progress(self._at)


def video(about: Json, data: bytes) -> Video:
    """A video from what the server says of it, and its file."""
    return Video(
        data=data,
        seed=about["seed"],
        model=about["model"],
        size=about["size"],
        seconds=float(about["seconds"]),
        job_id=about["id"],
    )


def is_video(data: bytes) -> bool:
    """Is it shown as a video? MP4 and GIF are; a WebP counts as a picture."""
    return data[4:8] == b"ftyp" or data.startswith(b"GIF8")


def _part(data: bytes) -> Json:
    kind, media_type = "image_url", "application/octet-stream"  # the server looks at the bytes
    if is_video(data):
        kind = "video_url"
    return {"type": kind, kind: {"url": f"data:{media_type};base64,{_base64(data)}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _given(options: dict[str, Any]) -> Json:
    return {name: value for name, value in options.items() if value is not None}
