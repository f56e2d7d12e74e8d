"""The diffusion service: prompts to pictures, many at once, one shared denoising step at a time.

A job's way: text encoding in one thread, denoising in the thread of the step batcher, decoding by
the autoencoder service, the picture into the blob store.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from gesso_contracts import SAFETENSORS, limits
from gesso_contracts import messages as m
from gesso_core.errors import UnknownModel
from gesso_core.hub import DEFAULT_STORE
from gesso_core.hub.store import SHIPPED_LORAS
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.provenance import provenance_of
from gesso_core.pipelines.step_batcher import StepBatcher
from gesso_core.pipelines.tensor_bytes import pack_tensors
from gesso_kernels.modes import Budget, Mode
from pydantic import Field

from gesso_services.painting import Painter, Sketch
from gesso_services.previews import Previews
from gesso_services.provenance import in_use, provenance_message
from gesso_services.runtime.job_context import JobContext
from gesso_services.runtime.service import ServiceContext, ServiceSpec
from gesso_services.runtime.settings import ServiceSettings
from gesso_services.step_thread import StepThread
from gesso_services.wishes import wish_of

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class DiffusionSettings(ServiceSettings):
    """Options of the service; environment ``GESSO_DIFFUSION_*``."""

    slots: int = Field(8, ge=1, description="pictures in the step batcher at once")
    models: tuple[str, ...] = Field(("sana-tiny",), description="registry names to serve")
    folders: dict[str, Path] = Field(
        default_factory=dict, description="pipeline folders to serve, by the name they get"
    )
    store: Path = Field(DEFAULT_STORE, description="where pulled models lie")
    lora_folder: Path | None = Field(
        SHIPPED_LORAS,
        description="*.safetensors that requests may name as LoRAs; read when they change",
    )
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="by default what the model was trained for; float32 on a CPU"
    )
    quantized_mode: Mode | None = Field(
        None, description="how quantized weights compute; by default what suits the device"
    )
    memory_budget: Budget = Field(
        "8bit", description="4bit keeps quantized weights in 4 bit where 8 would be faster"
    )
    cuda_graphs: bool = Field(True, description="replay the network on a GPU, not launch it")
    threads: int = Field(1, ge=1, description="CPU threads of one forward")
    max_batch_pixels: int = Field(4 * 1024 * 1024, ge=1, description="pixels that share a step")
    decode_timeout_s: float = Field(60.0, gt=0, description="one call of the autoencoder")
    decode_patience_s: float = Field(60.0, ge=0, description="waiting for a missing autoencoder")
    preview_side: int = Field(256, ge=16, description="longest side of a preview, pixels")


class DiffusionService:
    """One replica: every model of its settings, in memory, and one step batcher for all."""

    def __init__(self, settings: DiffusionSettings) -> None:
        self.settings = settings
        self.models: dict[str, Denoiser] = {}
        self.steps: StepThread | None = None
        self._text_thread = ThreadPoolExecutor(
            1, "text", initializer=torch.set_num_threads, initargs=(settings.threads,)
        )

    def in_use(self) -> dict[str, m.ModelInUse]:
        """How the loaded models compute, and what they take."""
        return {name: in_use(d.entry, d.identity) for name, d in self.models.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What is served."""
        return (*self.settings.models, *self.settings.folders)

    async def start(self, context: ServiceContext) -> None:
        """Load every model and start the denoising thread."""
        settings = self.settings
        self.blobs = context.blobs
        self.painter = Painter(
            context,
            timeout_s=settings.decode_timeout_s,
            patience_s=settings.decode_patience_s,
            preview_side=settings.preview_side,
        )
        for name in self.names:
            self.models[name] = await asyncio.to_thread(self._load, name)
            self._tell_of(name, context)
        self.steps = StepThread(
            StepBatcher(max_batch_pixels=settings.max_batch_pixels),
            threads=settings.threads,
            on_batch=context.metrics.batch,
        )
        self.steps.start()

    async def warm_up(self, context: ServiceContext) -> None:
        """A picture of two steps from every model, painted by the autoencoder service."""
        for name, denoiser in self.models.items():
            side = max(limits.MIN_SIDE, denoiser.entry.native_size)
            trial = m.GenerateImage(
                model=name, prompt="a red apple", width=side, height=side, seed=0, steps=2
            )
            await self.generate_image(trial, context.trial_job())

    async def stop(self) -> None:
        """Let go of the threads."""
        if self.steps is not None:  # the service may be stopped before it has started
            self.steps.stop()
        self._text_thread.shutdown(wait=False, cancel_futures=True)

    async def generate_image(self, request: m.GenerateImage, job: JobContext) -> m.ImageReady:
        """Text to picture."""
        denoiser = self._model(request.model)
        recipe = denoiser.recipe(wish_of(request))
        draft = await self._in_text_thread(denoiser.begin, recipe)
        finished = await self._denoised(denoiser, draft, request.preview_every, job)
        sketch = _sketch(denoiser, finished, finished.result)
        decoded = await self.painter.picture(sketch, request.output_format, job)
        made = await self._in_text_thread(provenance_of, denoiser, finished)
        return m.ImageReady(
            image=await self.blobs.laid_down(decoded.image),
            width=decoded.width,
            height=decoded.height,
            seed=recipe.seed,
            provenance=provenance_message(made),
        )

    async def embed_text(self, request: m.EmbedText) -> m.TextEmbedded:
        """States of the text encoder."""
        denoiser = self._model(request.model)
        data, dtype, shape = await self._in_text_thread(_embed, denoiser, request.prompts)
        states = await self.blobs.pack(
            data, SAFETENSORS, inline_limit=limits.INLINE_RPC_BYTES, dtype=dtype, shape=shape
        )
        return m.TextEmbedded(states=states)

    async def _denoised(
        self, denoiser: Denoiser, draft: Draft, preview_every: int, job: JobContext
    ) -> Draft:
        """The finished draft; progress and previews are told on the way."""

        def sketch(draft: Draft) -> Sketch:
            assert draft.denoised_CHW is not None  # previews follow a step
            return _sketch(denoiser, draft, draft.denoised_CHW)

        previews = Previews(sketch, self.painter.preview, job, every=preview_every)

        def on_step(draft: Draft) -> None:
            job.report(draft.steps_done, draft.recipe.steps)
            previews.offer(draft)

        assert self.steps is not None
        try:
            return await self.steps.finish(denoiser, draft, job, on_step=on_step)
        finally:
            await previews.close()

    async def _in_text_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, partial(work, *args, **kwargs))

    def _load(self, name: str) -> Denoiser:
        settings = self.settings
        return load_denoiser(
            settings.folders.get(name, name),
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
            device=settings.device,
            store=settings.store,
            name=name,
            lora_folder=settings.lora_folder,
            quantized_mode=settings.quantized_mode,
            memory_budget=settings.memory_budget,
            cuda_graphs=settings.cuda_graphs,
        )

    def _tell_of(self, name: str, context: ServiceContext) -> None:
        about = in_use(self.models[name].entry, self.models[name].identity)
        context.metrics.model_loaded(name, about.quantization, about.weight_bytes)
        log.info(
            "%s is loaded: quantization %s, weights %.1f MB",
            name,
            about.quantization,
            about.weight_bytes / 1e6,
        )

    def _model(self, name: str) -> Denoiser:
        if name not in self.models:
            raise UnknownModel(name, self.models)
        return self.models[name]


def _sketch(denoiser: Denoiser, draft: Draft, latent_CHW: torch.Tensor) -> Sketch:
    return Sketch(
        autoencoder=denoiser.autoencoder,
        latent_CHW=denoiser.unscaled(latent_CHW),
        height=draft.recipe.height,
        width=draft.recipe.width,
    )


def _embed(denoiser: Denoiser, prompts: Sequence[str]) -> tuple[bytes, str, tuple[int, ...]]:
    states = denoiser.text_encoder.encode(prompts)
    data = pack_tensors({"states": states.states_BLC, "mask": states.mask_BL})
    dtype = str(states.states_BLC.dtype).removeprefix("torch.")
    return data, dtype, tuple(states.states_BLC.shape)


def build_service(settings: DiffusionSettings | None = None) -> ServiceSpec:
    """The service as the runtime hosts it."""
    service = DiffusionService(settings or DiffusionSettings.for_service("diffusion"))
    return ServiceSpec(
        name="diffusion",
        settings=service.settings,
        rpc={"embed-text": service.embed_text},
        jobs={"generate-image": service.generate_image},
        start=service.start,
        warm_up=service.warm_up,
        stop=service.stop,
        models=service.names,
        in_use=service.in_use,
    )
