"""The Python client for asyncio; `gesso_services.client` has both."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

import httpx2
from gesso_contracts import JobEvent, JobState, JobStateChanged
from gesso_core.errors import GessoError

from gesso_services import client_labels as labels
from gesso_services import client_talk as talk
from gesso_services import client_wire as wire
from gesso_services.client_talk import Answer, OnText, Video
from gesso_services.client_wire import DEFAULT_URL, Json, OnProgress, Picture, Reconstruction


class AsyncGesso:
    """The awaiting client; see `Gesso` for what each call does."""

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 600.0
    ) -> None:
        self._http = httpx2.AsyncClient(**wire.options(base_url, api_key, timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self, prompt: str, *, on_progress: OnProgress | None = None, **options: Any
    ) -> list[Picture]:
        """Paint ``prompt``; cancelling the task withdraws the jobs."""
        pictures: dict[int, Picture] = {}
        body = wire.generation(prompt, options)
        async with self._stream("POST", "/v1/images/generations", json=body) as events:
            async for event in events:
                wire.take(event, pictures, on_progress)
        return wire.complete(pictures, body)

    async def vary(
        self,
        image: bytes,
        prompt: str | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> list[Picture]:
        """Paint from a picture."""
        pictures: dict[int, Picture] = {}
        form = wire.variation(image, prompt, options)
        async with self._stream("POST", "/v1/images/variations", **form) as events:
            async for event in events:
                wire.take(event, pictures, on_progress)
        return wire.complete(pictures, options)

    async def video(
        self, prompt: str, *, on_progress: OnProgress | None = None, **options: Any
    ) -> Video:
        """Make a short video; cancelling the task withdraws the job."""
        begun = await self._json("POST", talk.VIDEOS, json=talk.video_request(prompt, options))
        watcher = talk.Watcher(on_progress)
        try:
            async for event in self.watch(begun["id"]):
                watcher.take(event)
        except BaseException:
            with suppress(GessoError):
                await self.cancel(begun["id"])
            raise
        data = await self.result(begun["id"])
        return talk.video(await self._json("GET", f"{talk.VIDEOS}/{begun['id']}"), data)

    async def ask(
        self, question: str, *shown: bytes, on_text: OnText | None = None, **options: Any
    ) -> Answer:
        """Ask about pictures and videos."""
        listener = talk.Listener(on_text)
        body = talk.conversation(talk.question(question, shown), options)
        async with self._stream("POST", talk.CHAT, json=body) as chunks:
            async for chunk in chunks:
                listener.take(chunk)
        return listener.answer()

    async def chat(self, messages: Sequence[Json], **options: Any) -> AsyncIterator[str]:
        """Answer a conversation in OpenAI's messages, piece by piece."""
        listener = talk.Listener(None)
        body = talk.conversation(messages, options)
        async with self._stream("POST", talk.CHAT, json=body) as chunks:
            async for chunk in chunks:
                listener.take(chunk)
                if new := talk.words(chunk):
                    yield new
        listener.answer()

    async def judge(self, prompt: str, *images: bytes, model: str | None = None) -> list[float]:
        """How probable it is that each picture shows ``prompt``."""
        body = talk.judgement(prompt, images, model)
        return list((await self._json("POST", talk.JUDGEMENTS, json=body))["scores"])

    async def reconstruct(
        self, image: bytes, *, model: str | None = None, output_format: str = "png"
    ) -> Reconstruction:
        """Send a picture through the autoencoder and back."""
        upload = wire.upload(image, model, output_format)
        return wire.reconstruction(await self._json("POST", "/v1/images/reconstructions", **upload))

    async def segment(self, image: bytes, prompts: Sequence[Json], **options: Any) -> list[Json]:
        """Cut out what boxes and clicks point at."""
        form = labels.segment_form(image, prompts, options)
        return list((await self._json("POST", labels.SEGMENT, **form))["masks"])

    async def annotate_text(
        self,
        image: bytes,
        words: Sequence[Json] | None = None,
        *,
        name: str = "image",
        key: str | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Masks for the characters of words."""
        form = labels.text_form(image, words, name, options)
        begun = await self._json("POST", labels.TEXT, **form, **labels.keyed(key))
        return await self.labels(begun["id"], on_progress=on_progress)

    async def annotate_cars(
        self,
        image: bytes,
        calibration: str,
        prompts: Sequence[Json],
        points: bytes | None = None,
        *,
        name: str = "image",
        key: str | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Boxes in space for cars."""
        form = labels.cars_form(image, calibration, prompts, points, name, options)
        begun = await self._json("POST", labels.CARS, **form, **labels.keyed(key))
        return await self.labels(begun["id"], on_progress=on_progress)

    async def draw_signs(
        self,
        prompt: str,
        words: Sequence[str],
        *,
        key: str | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Json:
        """Pictures with signs, labelled; cancelling the task withdraws the job, unless it has a
        ``key``.
        """
        body = labels.draw_request(prompt, words, options)
        begun = await self._json("POST", labels.DRAW, json=body, **labels.keyed(key))
        try:
            return await self.labels(begun["id"], on_progress=on_progress)
        except BaseException:
            if key is None:
                with suppress(GessoError):
                    await self.cancel(begun["id"])
            raise

    async def labels(self, job_id: str, *, on_progress: OnProgress | None = None) -> Json:
        """The labels of an annotation that was begun, when it is done."""
        watcher, state = talk.Watcher(on_progress), None
        async for event in self.watch(job_id):
            watcher.take(event)
            if isinstance(event, JobStateChanged):
                state = event.state
        labels.checked_state(state)
        return await self._json("GET", f"/v1/jobs/{wire.segment(job_id)}/result")

    async def drawing(
        self, job_id: str, part: str = "overlay", *, picture: int | None = None
    ) -> bytes:
        """A file of a finished annotation: ``overlay``, ``birds-eye``, ``meshes`` or ``occupancy``;
        of one that drew pictures ``image``, ``overlay`` or ``truth`` of the one with this number.
        """
        return await self._bytes(labels.drawing_path(job_id, part, picture))

    async def export(self, job_id: str, file_format: str) -> bytes:
        """A finished annotation as coco, yolo, label-studio, textseg or kitti."""
        path = f"/v1/jobs/{wire.segment(job_id)}/export"
        return await self._bytes(path, params={"format": file_format})

    async def models(self) -> list[Json]:
        """What the server can paint and encode with."""
        return list((await self._json("GET", "/v1/models"))["data"])

    async def submit(self, job_id: str, request: Json, *, kind: str = "generate-image") -> JobState:
        """Put a job in the queue; the same id again is the same job."""
        body = {"kind": kind, "request": request}
        return JobState.model_validate(
            await self._json("PUT", f"/v1/jobs/{wire.segment(job_id)}", json=body)
        )

    async def job(self, job_id: str) -> JobState:
        """What is known about a job."""
        return JobState.model_validate(await self._json("GET", f"/v1/jobs/{wire.segment(job_id)}"))

    async def cancel(self, job_id: str) -> JobState:
        """Withdraw a job; a running one stops at its next step."""
        return JobState.model_validate(
            await self._json("DELETE", f"/v1/jobs/{wire.segment(job_id)}")
        )

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """The state now, then everything that happens, until the job is final."""
        async with self._stream("GET", f"/v1/jobs/{wire.segment(job_id)}/events") as events:
            async for event in events:
                yield wire.event(event)

    async def result(self, job_id: str) -> bytes:
        """What a job made that succeeded: the file of a picture or video, or JSON."""
        return await self._bytes(f"/v1/jobs/{wire.segment(job_id)}/result")

    async def _bytes(self, path: str, **options: Any) -> bytes:
        with wire.reachable(self._http.base_url):
            answer = await self._http.get(path, **options)
        wire.raise_for_status(answer)
        return answer.content

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        with wire.reachable(self._http.base_url):
            return wire.as_json(await self._http.request(method, path, **options))

    @asynccontextmanager
    async def _stream(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[AsyncIterator[Json]]:
        with wire.reachable(self._http.base_url):
            async with self._http.stream(method, path, **options) as answer:
                if answer.is_error:
                    await answer.aread()
                wire.raise_for_status(answer)
                source = httpx2.EventSource(answer, wire.MAX_EVENT_BYTES)
                yield (
                    wire.checked(event.data) async for event in source if event.data != wire.DONE
                )
