"""What every kind of annotation works with: the segmenter, the reader, the shapes, the threads.

The segmenter's files may be missing when the service starts. It starts all the same, says what is
missing, and looks again whenever it is asked.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Final, ParamSpec, TypeVar

import numpy as np
import torch
from gesso_contracts import annotations as a
from gesso_contracts.blobs import Payload
from gesso_core.annotate.char_sam.ocr import TextReader, WheelReader
from gesso_core.annotate.char_sam.pipeline import CharSam
from gesso_core.annotate.char_sam.words import WordAnnotation
from gesso_core.annotate.pictures import open_picture
from gesso_core.annotate.segmenter.cache import DEFAULT_BYTES, EmbeddingCache
from gesso_core.annotate.segmenter.contract import (
    Embedding,
    Masks,
    Prompt,
    Segmenter,
    embedding_key,
)
from gesso_core.annotate.segmenter.load import DEFAULT_SEGMENTER, load_segmenter
from gesso_core.annotate.slf.prior import ShapePrior, load_prior
from gesso_core.errors import GessoError, Unavailable, UnknownModel
from gesso_core.hub import DEFAULT_STORE
from gesso_core.pipelines.pictures import MAX_PIXELS, Pixels
from gesso_core.pipelines.provenance import library_versions
from numpy.typing import NDArray
from pydantic import Field

from gesso_services.runtime.service import ServiceContext
from gesso_services.runtime.settings import ServiceSettings

P = ParamSpec("P")
T = TypeVar("T")

TEXT: Final = "char-sam"
CARS: Final = "slf-cars"
WEIGHT_FILES: Final = ("*.onnx", "*.safetensors")
log = logging.getLogger(__name__)


class AnnotationSettings(ServiceSettings):
    """Options of the service; environment ``GESSO_ANNOTATION_*``."""

    segmenter: str = Field(DEFAULT_SEGMENTER, description="registry name of a segmenter")
    folder: Path | None = Field(
        None, description="where that segmenter lies, instead of in the store"
    )
    store: Path = Field(DEFAULT_STORE, description="where fetched and pulled models lie")
    fonts: Path | None = Field(None, description="further fonts, for scripts the shipped lack")
    prior: Path | None = Field(None, description="a folder with a shape prior of one's own")
    reader: bool = Field(True, description="read words with the OCR package, if it is installed")
    device: str = Field("cpu", description="of a published segmenter")
    threads: int = Field(1, ge=1, description="CPU threads of one model call")
    cache_bytes: int = Field(DEFAULT_BYTES, ge=0, description="pictures that were looked at")
    drawing_patience_s: float = Field(
        60.0, gt=0, description="waiting for a sign of life of a picture that is being drawn"
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest picture that is opened")


class CachedSegmenter:
    """The segmenter with its embeddings kept: the same picture again costs no second look.

    Attributes:
        looks: embeddings that this one asked for and that were not there.
    """

    def __init__(self, segmenter: Segmenter, cache: EmbeddingCache) -> None:
        self.segmenter, self.cache = segmenter, cache
        self.name, self.sha256 = segmenter.name, segmenter.sha256
        self.looks = 0

    def embed(self, picture_HW3: Pixels) -> Embedding:
        """From the cache, or computed and kept."""
        key = embedding_key(picture_HW3, self.sha256)
        self.looks += self.cache.get(key) is None
        return self.cache.embed(self.segmenter, picture_HW3, key=key)

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """As the segmenter does."""
        return self.segmenter.predict(embedding, prompts, multimask=multimask)


class OneAtATime:
    """A reader whose search for words keeps a state: callers from several threads take turns."""

    def __init__(self, reader: TextReader) -> None:
        self.reader = reader
        self._turn = Lock()

    @property
    def alphabet(self) -> Sequence[str]:
        """As the reader has it."""
        return self.reader.alphabet

    def find(self, picture_HW3: Pixels) -> list[WordAnnotation]:
        """As the reader does, one picture at a time."""
        with self._turn:
            return self.reader.find(picture_HW3)

    def log_probs(self, strip_hw3: Pixels) -> NDArray[np.float64]:
        """As the reader does."""
        return self.reader.log_probs(strip_hw3)


class Workshop:
    """One replica's means. Jobs run in threads of their own: a click never waits for one."""

    def __init__(self, settings: AnnotationSettings) -> None:
        self.settings = settings
        self.cache = EmbeddingCache(settings.cache_bytes)
        self._segmenter: Segmenter | None = None
        self._problem = ""
        self._looking: Future[None] | None = None
        self._loading = Lock()
        self._jobs = _threads(settings.slots, "annotation", settings.threads)
        self._clicks = _threads(1, "clicks", settings.threads)

    @property
    def names(self) -> tuple[str, ...]:
        """What is served."""
        return (TEXT, CARS, self.settings.segmenter)

    async def open(self, context: ServiceContext) -> None:
        """Load what is there; a segmenter that is not is named in the log."""
        self.blobs = context.blobs
        await self.for_click(self._prepare)
        if self._segmenter is None:
            log.warning("annotation waits for its segmenter: %s", self._problem)

    def close(self) -> None:
        """Let go of the threads."""
        for threads in (self._jobs, self._clicks):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_equipped(self) -> bool:
        """Is the segmenter loaded?"""
        return self._segmenter is not None

    def missing(self) -> dict[str, str]:
        """Every model that cannot be used, and what to do about it; looks again aside."""
        if self._segmenter is not None:
            return {}
        if self._looking is None or self._looking.done():  # a large model takes its time to load
            self._looking = self._clicks.submit(self._look)
        return dict.fromkeys(self.names, self._problem)

    def segmenter(self) -> CachedSegmenter:
        """The segmenter; raises WeightsError, saying how to get it, while it is missing."""
        with self._loading:
            if self._segmenter is None:
                self._segmenter = self._load()
        return CachedSegmenter(self._segmenter, self.cache)

    def annotator(self) -> CharSam:
        """Char-SAM on the segmenter."""
        # A word's crop is looked at once, so it would only push pictures out of the cache.
        return CharSam(self.segmenter().segmenter, fonts=self.settings.fonts, reader=self.reader)

    @cached_property
    def reader(self) -> TextReader | None:
        """Who finds words where none are given; None where the package is not installed."""
        try:
            if self.settings.reader:
                return OneAtATime(WheelReader(threads=self.settings.threads))
        except Unavailable as error:
            log.warning("%s", error.message)
        return None

    @cached_property
    def prior(self) -> ShapePrior:
        """The shapes of cars."""
        return load_prior(folder=self.settings.prior)

    def weight_bytes(self, name: str) -> int:
        """What a model's own weights take in memory; Char-SAM has none of its own."""
        if name == CARS:
            tensors = (self.prior.mean_XYZ, self.prior.components_KXYZ)
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if name == TEXT:
            return 0
        folder = self.settings.folder or self.settings.store / self.settings.segmenter
        files = (path for kind in WEIGHT_FILES for path in folder.glob(kind))
        return sum(path.stat().st_size for path in files)

    def check_model(self, name: str, served: str) -> None:
        """`UnknownModel` unless this is the one model for that kind of work."""
        if name != served:
            raise UnknownModel(name, (served,))

    def provenance(self, model: str) -> a.AnnotationProvenance:
        """What makes labels here."""
        segmenter = self.segmenter()
        return a.AnnotationProvenance(
            model=model,
            segmenter=segmenter.name,
            segmenter_sha256=segmenter.sha256,
            weights_sha256=self.prior.sha256 if model == CARS else None,
            versions=dict(library_versions()),
        )

    async def opened(self, payload: Payload) -> Pixels:
        """The pixels of a picture that came along."""
        data = await self.blobs.read(payload)
        return await asyncio.to_thread(open_picture, data, max_pixels=self.settings.max_pixels)

    async def for_job(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``, done in a thread of the jobs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._jobs, partial(work, *args, **kwargs))

    async def for_click(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``, done in the thread of the clicks."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._clicks, partial(work, *args, **kwargs))

    def _prepare(self) -> None:
        """All that there is, before the threads of the jobs ask for it at the same time."""
        _ = self.reader, self.prior
        self._look()

    def _look(self) -> None:
        """Load the segmenter, or remember why that is not possible."""
        try:
            self.segmenter()
        except GessoError as error:
            self._problem = error.message

    def _load(self) -> Segmenter:
        settings = self.settings
        return load_segmenter(
            settings.folder or settings.segmenter,
            store=settings.store,
            threads=settings.threads,
            device=settings.device,
        )


def _threads(count: int, name: str, torch_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        count, name, initializer=torch.set_num_threads, initargs=(torch_threads,)
    )
