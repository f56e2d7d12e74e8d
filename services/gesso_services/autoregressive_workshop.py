"""What every kind of autoregressive job works with: models, threads, room, blobs, the painter."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from gesso_contracts.blobs import Payload
from gesso_core.errors import UnknownModel, UnreadableImage
from gesso_core.hub import DEFAULT_STORE
from gesso_core.pipelines.draw import Draws
from gesso_core.pipelines.pictures import MAX_PIXELS, Pixels, decode_picture
from gesso_core.pipelines.step_batcher import Advances, D, StepBatcher
from pydantic import Field

from gesso_services.admission import Room
from gesso_services.painting import Painter
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext
from gesso_services.runtime.settings import ServiceSettings
from gesso_services.step_thread import StepThread

P = ParamSpec("P")
T = TypeVar("T")

GIB = 2**30
KV_SETTING = "GESSO_AUTOREGRESSIVE_KV_CACHE_BYTES"


class AutoregressiveSettings(ServiceSettings):
    """Options of the service; environment ``GESSO_AUTOREGRESSIVE_*``."""

    slots: int = Field(16, ge=1, description="pictures, videos and answers under way at once")
    models: tuple[str, ...] = Field(
        ("hart-tiny", "vilau-tiny"), description="registry names to serve"
    )
    folders: dict[str, Path] = Field(
        default_factory=dict, description="model folders to serve, by the name they get"
    )
    store: Path = Field(DEFAULT_STORE, description="where pulled models lie")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="by default what the model was trained for; float32 on a CPU"
    )
    threads: int = Field(1, ge=1, description="CPU threads of one forward")
    max_batch_pixels: int = Field(4 * 1024 * 1024, ge=1, description="pixels that share a step")
    kv_cache_bytes: int = Field(
        4 * GIB, ge=1, description="keys and values of all that is under way; the rest waits"
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest picture that is opened")
    decode_timeout_s: float = Field(60.0, gt=0, description="one call of the autoencoder")
    decode_patience_s: float = Field(60.0, ge=0, description="waiting for a missing autoencoder")
    preview_side: int = Field(256, ge=16, description="longest side of a preview, pixels")


class Workshop:
    """One replica's means. Prompts are read in one thread, steps are made in another."""

    def __init__(self, settings: AutoregressiveSettings) -> None:
        self.settings = settings
        self.models: dict[str, Draws] = {}
        self.room = Room(settings.kv_cache_bytes, setting=KV_SETTING)
        self._steps: StepThread | None = None
        self._prompts = ThreadPoolExecutor(
            1, "prompts", initializer=torch.set_num_threads, initargs=(settings.threads,)
        )

    def open(self, context: ServiceContext) -> None:
        """Start the thread of the steps, and remember whom to ask."""
        settings = self.settings
        self.blobs = context.blobs
        self.painter = Painter(
            context,
            timeout_s=settings.decode_timeout_s,
            patience_s=settings.decode_patience_s,
            preview_side=settings.preview_side,
        )
        self._steps = StepThread(
            StepBatcher(max_batch_pixels=settings.max_batch_pixels),
            threads=settings.threads,
            on_batch=context.metrics.batch,
        )
        self._steps.start()

    def close(self) -> None:
        """Let go of the threads."""
        if self._steps is not None:  # the service may be stopped before it has started
            self._steps.stop()
        self._prompts.shutdown(wait=False, cancel_futures=True)

    def model(self, name: str) -> Draws:
        """A model of this replica; `UnknownModel` lists those it has."""
        if name not in self.models:
            raise UnknownModel(name, self.models)
        return self.models[name]

    async def aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``, done in the thread that reads prompts."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._prompts, partial(work, *args, **kwargs))

    async def opened(self, payload: Payload, field: str) -> Pixels:
        """The pixels of a picture that came along; UnreadableImage names ``field``."""
        data = await self.blobs.read(payload)
        try:
            return await asyncio.to_thread(
                decode_picture, data, max_pixels=self.settings.max_pixels
            )
        except UnreadableImage as error:
            raise UnreadableImage(error.message, field=field) from error

    async def finish(
        self, model: Advances[D], draft: D, job: JobContext, *, on_step: Callable[[D], None]
    ) -> D:
        """The finished draft; see `StepThread.finish`."""
        assert self._steps is not None
        return await self._steps.finish(model, draft, job, on_step=on_step)
