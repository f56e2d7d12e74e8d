"""The Python client: two small classes over the HTTP API, one that blocks and one that awaits.

    with Gesso() as gesso:
        (picture,) = gesso.generate("a red apple, 3D style, on a blue background")
        picture.save("apple.png")

Every failure is an :class:`ApiError` (the server said no, and why) or a :class:`NotReachable`.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self

import httpx2
from gesso_contracts import JobEvent, JobState

from gesso_services import client_wire as wire
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
    "ApiError",
    "AsyncGesso",
    "Gesso",
    "NotReachable",
    "Picture",
    "Progress",
    "Reconstruction",
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
        partial_images and loras, ``{"ink": 0.8}`` for one at a strength. Leaving the call early (an
        exception in ``on_progress``) withdraws the jobs.
        """
        pictures: dict[int, Picture] = {}
        body = wire.generation(prompt, options)
        with self._stream("POST", "/v1/images/generations", json=body) as events:
            for event in events:
                wire.take(event, pictures, on_progress)
        return wire.complete(pictures, body)

    def reconstruct(
        self, image: bytes, *, model: str | None = None, output_format: str = "png"
    ) -> Reconstruction:
        """Send a picture (PNG, JPEG or WebP bytes) through the autoencoder and back."""
        answer = self._json(
            "POST", "/v1/images/reconstructions", **wire.upload(image, model, output_format)
        )
        return wire.reconstruction(answer)

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
        """The picture of a job that succeeded."""
        with wire.reachable(self._http.base_url):
            answer = self._http.get(f"/v1/jobs/{wire.segment(job_id)}/result")
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
            )


class AsyncGesso:
    """The same for asyncio; see :class:`Gesso` for what each call does."""

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

    async def reconstruct(
        self, image: bytes, *, model: str | None = None, output_format: str = "png"
    ) -> Reconstruction:
        """Send a picture through the autoencoder and back."""
        upload = wire.upload(image, model, output_format)
        return wire.reconstruction(await self._json("POST", "/v1/images/reconstructions", **upload))

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
        """The picture of a job that succeeded."""
        with wire.reachable(self._http.base_url):
            answer = await self._http.get(f"/v1/jobs/{wire.segment(job_id)}/result")
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
                yield (wire.checked(event.data) async for event in source)
