"""Finished pictures on their way out: as one answer, or as server-sent events while they come.

The events are those of OpenAI's image streaming; ``progress`` is ours.
"""

import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from gesso_contracts import (
    GenerateImage,
    ImageFormat,
    ImageReady,
    JobPreview,
    JobProgress,
    JobStateChanged,
    JobText,
)
from gesso_core.errors import GessoError

from gesso_services.gateway import orders, painting, streams
from gesso_services.gateway.best_of import Chosen, Contest
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.orders import Order
from gesso_services.gateway.schemas import (
    ImageData,
    ImagesResponse,
    Metadata,
    ResponseFormat,
    Score,
)
from gesso_services.runtime.job_events import Event

IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}


class Wish(Protocol):
    """How the pictures shall come."""

    @property
    def response_format(self) -> ResponseFormat:
        """Their bytes, or a URL."""
        ...

    @property
    def output_format(self) -> ImageFormat:
        """The format of the files."""
        ...


class Delivery:
    """The pictures of one order, to the one who asked for them."""

    def __init__(
        self,
        request: Request,
        fabric: Fabric,
        order: Order[GenerateImage],
        wish: Wish,
        contest: Contest | None = None,
    ) -> None:
        self.request, self.fabric, self.order, self.wish = request, fabric, order, wish
        self.contest = contest

    async def wait(self) -> ImagesResponse | None:
        """All pictures in one answer; None when nobody is there to read it."""
        work = painting.paint(self.fabric, self.order, self.contest)
        made = await orders.while_connected(self.request, work)
        if made is None:
            return None
        return ImagesResponse(
            created=int(time.time()),
            data=[await self._data(chosen) for chosen in made],
            size=painting.size_of(self.order),
            output_format=self.wish.output_format,
            metadata=Metadata.model_validate(made[0].ready.provenance.model_dump()),
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Every event of every job as it comes; a picture as soon as it is finished, or once it is
        chosen.
        """
        scribe = _Scribe(self)
        try:
            async with aclosing(orders.events(self.fabric, self.order)) as events:
                async for item in events:
                    yield streams.HEARTBEAT if item is None else await scribe.write(*item)
            if self.contest is not None:
                async for part in scribe.choose(self.contest):
                    yield part
        except GessoError as error:
            yield streams.failure(error)

    async def bytes_or_url(self, chosen: Chosen) -> dict[str, str]:
        """The picture as the field of an answer."""
        if self.wish.response_format == "url":
            job_id = self.order.jobs[chosen.index][0]
            return {"url": str(self.request.url_for("get_image", job_id=job_id))}
        return {"b64_json": base64_text(await self.fabric.blobs.get(chosen.ready.image))}

    async def _data(self, chosen: Chosen) -> ImageData:
        return ImageData(
            seed=chosen.ready.seed,
            job_id=self.order.jobs[chosen.index][0],
            metadata=_score(chosen),
            **await self.bytes_or_url(chosen),
        )


class _Scribe:
    """Bus events in the words of OpenAI's image streaming."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery, self.jobs = delivery, delivery.order.jobs
        self.began = time.monotonic()
        self._made: dict[int, ImageReady] = {}
        self._steps = [(0, 0, 0.0)] * len(self.jobs)
        self._previews = [0] * len(self.jobs)

    async def write(self, index: int, event: Event) -> bytes:
        """One event for one event: previews, finished pictures, and progress for all else."""
        if isinstance(event, JobPreview):
            return self._partial(index, event)
        if not isinstance(event, JobText):
            at = event if isinstance(event, JobProgress) else event.state
            self._steps[index] = (at.step, at.total_steps, at.progress)
        if isinstance(event, JobStateChanged) and event.state.status == "succeeded":
            self._made[index] = orders.result_of(event.state, ImageReady)
            if self.delivery.contest is None:
                return await self._completed(Chosen(index, self._made[index]))
        return self._say("progress", index)

    async def choose(self, contest: Contest) -> AsyncGenerator[bytes, None]:
        """The winners, best first."""
        fabric = self.delivery.fabric
        work = contest.choose(fabric, [self._made[index] for index in range(len(self.jobs))])
        beats = streams.result_with_heartbeats(work, fabric.settings.heartbeat_s)
        async with aclosing(beats):
            async for winners in beats:
                if winners is None:
                    yield streams.HEARTBEAT
                    continue
                for rank, chosen in enumerate(winners):
                    yield await self._completed(chosen, rank=rank, score=chosen.score)

    async def _completed(self, chosen: Chosen, **more: Any) -> bytes:
        ready = chosen.ready
        return self._say(
            "completed",
            chosen.index,
            **await self.delivery.bytes_or_url(chosen),
            created_at=int(time.time()),
            size=painting.size_of(self.delivery.order),
            output_format=self.delivery.wish.output_format,
            seed=ready.seed,
            seconds=round(time.monotonic() - self.began, 3),
            metadata=ready.provenance.model_dump(mode="json"),
            **more,
        )

    def _partial(self, index: int, event: JobPreview) -> bytes:
        number, self._previews[index] = self._previews[index], self._previews[index] + 1
        return self._say(
            "partial_image",
            index,
            partial_image_index=number,
            b64_json=base64_text(event.image),
            created_at=int(time.time()),
            size=painting.size_of(self.delivery.order),
            output_format=IMAGE_TYPES.get(event.media_type, "webp"),
        )

    def _say(self, what: str, index: int, **more: Any) -> bytes:
        name = f"image_generation.{what}"
        step, total, progress = self._steps[index]
        about = {"type": name, "index": index, "job_id": self.jobs[index][0]}
        at = {"step": step, "total_steps": total, "progress": progress}
        return streams.event(name, {**about, **at, **more})


def base64_text(data: bytes) -> str:
    """Bytes as they stand in JSON."""
    return base64.b64encode(data).decode("ascii")


def _score(chosen: Chosen) -> Score | None:
    if chosen.score is None or chosen.judge is None:
        return None
    return Score(score=chosen.score, judge=chosen.judge)
