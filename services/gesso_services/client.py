"""The Python client: two small classes over the HTTP API, one that blocks and one that awaits.

    with Gesso() as gesso:
        (picture,) = gesso.generate("a red apple, 3D style, on a blue background")
        picture.save("apple.png")

Every failure is an :class:`ApiError` (the server said no, and why) or a :class:`NotReachable`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import httpx2
from gesso_contracts import JobEvent, JobState, JobStateChanged
from gesso_core.errors import GessoError

from gesso_services import client_labels as labels
from gesso_services import client_talk as talk
from gesso_services import client_wire as wire
from gesso_services.client_async import AsyncGesso
from gesso_services.client_talk import Answer, OnText, Video
from gesso_services.client_wire import (
    DEFAULT_URL,
    ApiError,
    Json,
    NotReachable,
    OnProgress,
    Picture,
    Progress,
    Reconstruction,
)

__all__ = [
    "DEFAULT_URL",
    "Answer",
    "ApiError",
    "AsyncGesso",
    "Gesso",
    "NotReachable",
    "Picture",
    "Progress",
    "Reconstruction",
    "Video",
]


class Gesso:
    """The blocking client. Use it as a context manager, or call :meth:`close`."""

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 600.0
    ) -> None:
        self._http = httpx2.Client(**wire.options(base_url, api_key, timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(
        self, prompt: str, *, on_progress: OnProgress | None = None, **options: Any
    ) -> list[Picture]:
        """Paint ``prompt``. ``options`` are the fields of ``POST /v1/images/generations``: model,
        n, size, seed, steps, guidance_scale, negative_prompt, sampler, output_format,
        partial_images, top_k, top_p, best_of with judge, and loras, ``{"ink": 0.8}`` for one at a
        strength. Leaving the call early (an exception in ``on_progress``) withdraws the jobs.
        """
        pictures: dict[int, Picture] = {}
        body = wire.generation(prompt, options)
        with self._stream("POST", "/v1/images/generations", json=body) as events:
            for event in events:
                wire.take(event, pictures, on_progress)
        return wire.complete(pictures, body)

    def vary(
        self,
        image: bytes,
        prompt: str | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> list[Picture]:
        """Paint from a picture (PNG, JPEG or WebP bytes): its first ``keep`` scales or rows stay.
        ``options`` are the fields of ``POST /v1/images/variations``.
        """
        pictures: dict[int, Picture] = {}
        form = wire.variation(image, prompt, options)
        with self._stream("POST", "/v1/images/variations", **form) as events:
            for event in events:
                wire.take(event, pictures, on_progress)
        return wire.complete(pictures, options)

    def video(self, prompt: str, *, on_progress: OnProgress | None = None, **options: Any) -> Video:
        """Make a short video. ``options`` are the fields of ``POST /v1/videos``: model, seed, fps,
        output_format, guidance_scale. Leaving the call early withdraws the job.
        """
        begun = self._json("POST", talk.VIDEOS, json=talk.video_request(prompt, options))
        watcher = talk.Watcher(on_progress)
        try:
            for event in self.watch(begun["id"]):
                watcher.take(event)
        except BaseException:
            with suppress(GessoError):
                self.cancel(begun["id"])
            raise
        data = self.result(begun["id"])
        return talk.video(self._json("GET", f"{talk.VIDEOS}/{begun['id']}"), data)

    def ask(
        self, question: str, *shown: bytes, on_text: OnText | None = None, **options: Any
    ) -> Answer:
        """Ask about pictures and videos, given as the bytes of their files, or about nothing that
        can be seen. ``options`` are fields of ``POST /v1/chat/completions``: model, max_tokens,
        temperature, top_p, seed, stop. ``on_text`` gets the words as they come.
        """
        listener = talk.Listener(on_text)
        body = talk.conversation(talk.question(question, shown), options)
        with self._stream("POST", talk.CHAT, json=body) as chunks:
            for chunk in chunks:
                listener.take(chunk)
        return listener.answer()

    def chat(self, messages: Sequence[Json], **options: Any) -> Iterator[str]:
        """Answer a conversation in OpenAI's messages, piece by piece."""
        listener = talk.Listener(None)
        body = talk.conversation(messages, options)
        with self._stream("POST", talk.CHAT, json=body) as chunks:
            for chunk in chunks:
                listener.take(chunk)
                if new := talk.words(chunk):
                    yield new
        listener.answer()

    def judge(self, prompt: str, *images: bytes, model: str | None = None) -> list[float]:
        """How probable it is that each picture shows ``prompt``."""
        body = talk.judgement(prompt, images, model)
        return list(self._json("POST", talk.JUDGEMENTS, json=body)["scores"])

    def reconstruct(
        self, image: bytes, *, model: str | None = None, output_format: str = "png"
    ) -> Reconstruction:
        """Send a picture (PNG, JPEG or WebP bytes) through the autoencoder and back."""
        answer = self._json(
            "POST", "/v1/images/reconstructions", **wire.upload(image, model, output_format)
        )
        return wire.reconstruction(answer)

    def segment(self, image: bytes, prompts: Sequence[Json], **options: Any) -> list[Json]:
        """Cut out what boxes and clicks point at: a mask in COCO's run lengths per prompt, like
        ``{"box": [x0, y0, x1, y1]}`` or ``{"points": [[x, y]], "labels": [1]}``.
        """
        form = labels.segment_form(image, prompts, options)
        return list(self._json("POST", labels.SEGMENT, **form)["masks"])

    def annotate_text(
        self,
        image: bytes,
        words: Sequence[Json] | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Masks for the characters of ``words``, each ``{"text": ..., "polygon": [[x, y], ...]}``,
        or of those that a reader finds. ``options``: model, refine, min_score, name, key.
        """
        return self.labels(self.begin_text(image, words, **options).id, on_progress=on_progress)

    def annotate_cars(
        self,
        image: bytes,
        calibration: str,
        prompts: Sequence[Json],
        points: bytes | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Boxes in space for cars. ``calibration`` and ``points`` are KITTI's files, a prompt is
        ``{"box": [...]}`` or ``{"point": [x, y]}``. ``options``: model, driving_side, meshes, name,
        key.
        """
        begun = self.begin_cars(image, calibration, prompts, points, **options)
        return self.labels(begun.id, on_progress=on_progress)

    def begin_text(
        self,
        image: bytes,
        words: Sequence[Json] | None = None,
        *,
        name: str = "image",
        key: str | None = None,
        **options: Any,
    ) -> JobState:
        """Begin to annotate text; with the same ``key`` the same request is the same job."""
        form = labels.text_form(image, words, name, options)
        answer = self._json("POST", labels.TEXT, **form, **labels.keyed(key))
        return JobState.model_validate(answer)

    def begin_cars(
        self,
        image: bytes,
        calibration: str,
        prompts: Sequence[Json],
        points: bytes | None = None,
        *,
        name: str = "image",
        key: str | None = None,
        **options: Any,
    ) -> JobState:
        """Begin to annotate cars."""
        form = labels.cars_form(image, calibration, prompts, points, name, options)
        answer = self._json("POST", labels.CARS, **form, **labels.keyed(key))
        return JobState.model_validate(answer)

    def draw_signs(
        self,
        prompt: str,
        words: Sequence[str],
        *,
        key: str | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Draw ``prompt``, put a sign with these words into every picture, one per line, and label
        its characters. ``options``: n, seed, size, generator, model, refine, min_score. Leaving the
        call early withdraws the job, unless it has a ``key``.
        """
        body = labels.draw_request(prompt, words, options)
        begun = self._json("POST", labels.DRAW, json=body, **labels.keyed(key))
        try:
            return self.labels(begun["id"], on_progress=on_progress)
        except BaseException:
            if key is None:
                with suppress(GessoError):
                    self.cancel(begun["id"])
            raise

    def labels(self, job_id: str, *, on_progress: OnProgress | None = None) -> Json:
        """The labels of an annotation that was begun, when it is done."""
        watcher, state = talk.Watcher(on_progress), None
        for event in self.watch(job_id):
            watcher.take(event)
            if isinstance(event, JobStateChanged):
                state = event.state
        labels.checked_state(state)
        return self._json("GET", f"/v1/jobs/{wire.segment(job_id)}/result")

    def drawing(self, job_id: str, part: str = "overlay", *, picture: int | None = None) -> bytes:
        """A file of a finished annotation: ``overlay``, ``birds-eye``, ``meshes`` or ``occupancy``;
        of one that drew pictures ``image``, ``overlay`` or ``truth`` of the one with this number.
        """
        return self._bytes(labels.drawing_path(job_id, part, picture))

    def export(self, job_id: str, file_format: str) -> bytes:
        """A finished annotation as coco, yolo, label-studio, textseg or kitti."""
        path = f"/v1/jobs/{wire.segment(job_id)}/export"
        return self._bytes(path, params={"format": file_format})

    def models(self) -> list[Json]:
        """What the server can paint and encode with."""
        return list(self._json("GET", "/v1/models")["data"])

    def ready(self) -> Json:
        """The body of ``/health/ready``, whether the server is ready or not."""
        with wire.reachable(self._http.base_url):
            return wire.as_json(self._http.get("/health/ready"), also=(503,))

    def submit(self, job_id: str, request: Json, *, kind: str = "generate-image") -> JobState:
        """Put a job in the queue; the same id again is the same job."""
        body = {"kind": kind, "request": request}
        return JobState.model_validate(
            self._json("PUT", f"/v1/jobs/{wire.segment(job_id)}", json=body)
        )

    def job(self, job_id: str) -> JobState:
        """What is known about a job."""
        return JobState.model_validate(self._json("GET", f"/v1/jobs/{wire.segment(job_id)}"))

    def jobs(self, *, status: str | None = None, limit: int = 20) -> list[JobState]:
        """The jobs that changed last."""
        page = self._json("GET", "/v1/jobs", params=wire.query(status=status, limit=limit))
        return [JobState.model_validate(one) for one in page["data"]]

    def cancel(self, job_id: str) -> JobState:
        """Withdraw a job; a running one stops at its next step."""
        return JobState.model_validate(self._json("DELETE", f"/v1/jobs/{wire.segment(job_id)}"))

    def watch(self, job_id: str) -> Iterator[JobEvent]:
        """The state now, then everything that happens, until the job is final."""
        with self._stream("GET", f"/v1/jobs/{wire.segment(job_id)}/events") as events:
            for event in events:
                yield wire.event(event)

    def result(self, job_id: str) -> bytes:
        """What a job made that succeeded: the file of a picture or video, or JSON."""
        return self._bytes(f"/v1/jobs/{wire.segment(job_id)}/result")

    def _bytes(self, path: str, **options: Any) -> bytes:
        with wire.reachable(self._http.base_url):
            answer = self._http.get(path, **options)
        wire.raise_for_status(answer)
        return answer.content

    def _json(self, method: str, path: str, **options: Any) -> Json:
        with wire.reachable(self._http.base_url):
            return wire.as_json(self._http.request(method, path, **options))

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[Iterator[Json]]:
        with (
            wire.reachable(self._http.base_url),
            self._http.stream(method, path, **options) as answer,
        ):
            if answer.is_error:
                answer.read()
            wire.raise_for_status(answer)
            yield (
                wire.checked(event.data)
                for event in httpx2.EventSource(answer, wire.MAX_EVENT_BYTES)
                if event.data != wire.DONE
            )
