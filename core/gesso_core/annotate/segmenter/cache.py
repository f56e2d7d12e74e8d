"""Embeddings that are kept: the newest ones, up to so many bytes, each computed once."""

from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock
from typing import Final

from gesso_core.annotate.segmenter.contract import Embedding, Segmenter, embedding_key
from gesso_core.pipelines.pictures import Pixels

# An embedding of SAM has 4 MiB, one of SAM 2 has 16 MiB.
DEFAULT_BYTES: Final = 512 * 1024 * 1024


class EmbeddingCache:
    """Least recently used embeddings go first. Safe to use from several threads."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._pending: dict[str, Future[Embedding]] = {}
        self._nbytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of everything kept."""
        return self._nbytes

    def get(self, key: str) -> Embedding | None:
        """The embedding of this key, or None when it was never made or has gone."""
        with self._lock:
            return self._touch(key)

    def embed(
        self, segmenter: Segmenter, picture_HW3: Pixels, *, key: str | None = None
    ) -> Embedding:
        """The picture's embedding; who asks while another thread computes it waits for that.

        An embedding larger than the whole cache is answered and not kept. ``key`` is for who has it
        already: it takes a while to make for a large picture.
        """
        key = key or embedding_key(picture_HW3, segmenter.sha256)
        with self._lock:
            kept = self._touch(key)
            if kept is not None:
                return kept
            pending = self._pending.get(key)
            mine = pending is None
            if pending is None:
                pending = self._pending[key] = Future()
        if mine:
            self._compute(key, segmenter, picture_HW3, pending)
        return pending.result()

    def put(self, embedding: Embedding) -> None:
        """Keep an embedding that was made elsewhere."""
        with self._lock:
            self._keep(embedding)

    def _compute(
        self, key: str, segmenter: Segmenter, picture_HW3: Pixels, pending: Future[Embedding]
    ) -> None:
        try:
            embedding = segmenter.embed(picture_HW3)
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            pending.set_exception(error)  # those who wait learn of it, too
            raise
        with self._lock:
            self._keep(embedding)
            del self._pending[key]
        pending.set_result(embedding)

    def _touch(self, key: str) -> Embedding | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, embedding: Embedding) -> None:
        if embedding.nbytes > self._max_bytes or embedding.key in self._kept:
            return
        self._kept[embedding.key] = embedding
        self._nbytes += embedding.nbytes
        while self._nbytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.nbytes
