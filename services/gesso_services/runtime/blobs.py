"""Blobs: bytes too large for a message, kept by the broker for a limited time.

A blob is cut into chunks of 1 MiB, each one message of the stream BLOBS. Its key is its SHA-256, so
that a repeated upload writes the same thing again. Chunks are read by direct get, several at once,
because the client's own object store reads slowly.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeVar

from gesso_contracts import limits, subjects
from gesso_contracts.blobs import BlobRef, Inline
from gesso_core.errors import InvalidRequest, NotFound, Unavailable
from nats.js.errors import APIError, NotFoundError

from gesso_services.runtime.connection import BROKER_AWAY, Bus

T = TypeVar("T")

CHUNKS_IN_FLIGHT = 4
PATIENCE_S = 120.0  # how long a finished picture waits for a broker that restarts
HASH_IN_THREAD_BYTES = 4 * limits.MIB


class BlobStore:
    """Put, get and delete blobs through ``bus``."""

    def __init__(self, bus: Bus, *, chunk_bytes: int = limits.BLOB_CHUNK_BYTES) -> None:
        self.bus = bus
        self.chunk_bytes = chunk_bytes

    async def put(
        self,
        data: bytes,
        media_type: str,
        *,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> BlobRef:
        """Store ``data``; waits for a broker that is restarting."""
        if len(data) > limits.BLOB_BYTES:
            raise InvalidRequest(
                f"a blob of {len(data)} bytes; at most {limits.BLOB_BYTES} bytes are kept"
            )
        key = await _sha256(data)
        await _few_at_a_time(
            partial(self._put_chunk, key, index, data) for index in self._chunks(len(data))
        )
        return BlobRef(
            key=key, size=len(data), sha256=key, media_type=media_type, dtype=dtype, shape=shape
        )

    async def get(self, ref: BlobRef) -> bytes:
        """The bytes of ``ref``, checked against its size and hash."""
        parts = await _few_at_a_time(
            partial(self._get_chunk, ref.key, index) for index in self._chunks(ref.size)
        )
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != ref.size or await _sha256(data) != ref.sha256:
            raise Unavailable(f"blob {ref.key[:12]}… is damaged; make it again")
        return data

    async def delete(self, ref: BlobRef) -> None:
        """Remove every chunk of ``ref``; nothing happens when it is gone already."""
        await self.bus.js.purge_stream(subjects.STREAM_BLOBS, subject=subjects.blob(ref.key))

    async def read(self, payload: Inline | BlobRef) -> bytes:
        """The bytes of a payload, wherever they are."""
        return payload.data if isinstance(payload, Inline) else await self.get(payload)

    async def pack(
        self,
        data: bytes,
        media_type: str,
        *,
        inline_limit: int = limits.INLINE_JOB_BYTES,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Inline | BlobRef:
        """A payload: inline up to ``inline_limit`` bytes, a blob above."""
        if len(data) <= inline_limit:
            return Inline(data=data, media_type=media_type, dtype=dtype, shape=shape)
        return await self.put(data, media_type, dtype=dtype, shape=shape)

    async def laid_down(self, payload: Inline | BlobRef) -> BlobRef:
        """A payload as a blob, put where it is inline."""
        if isinstance(payload, BlobRef):
            return payload
        return await self.put(
            payload.data, payload.media_type, dtype=payload.dtype, shape=payload.shape
        )

    def _chunks(self, size: int) -> range:
        return range(-(-size // self.chunk_bytes))

    async def _put_chunk(self, key: str, index: int, data: bytes) -> None:
        chunk = data[index * self.chunk_bytes : (index + 1) * self.chunk_bytes]
        subject = subjects.blob_chunk(key, index)

        async def publish() -> None:
            await self.bus.js.publish(subject, chunk, stream=subjects.STREAM_BLOBS)

        try:
            await self.bus.until_done(publish, give_up_after_s=PATIENCE_S)
        except APIError as error:
            raise Unavailable(f"the broker refused a blob: {error.description}") from error

    async def _get_chunk(self, key: str, index: int) -> bytes:
        try:
            message = await self.bus.js.get_msg(
                subjects.STREAM_BLOBS, subject=subjects.blob_chunk(key, index), direct=True
            )
        except NotFoundError as error:
            raise NotFound(
                f"blob {key[:12]}… is not there; blobs are kept for a limited time, make it again"
            ) from error
        except BROKER_AWAY as error:
            raise Unavailable(f"the broker did not give blob {key[:12]}…; try again") from error
        return bytes(message.data or b"")


async def _sha256(data: bytes) -> str:
    if len(data) < HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


async def _few_at_a_time(work: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of ``work`` in order, with at most ``CHUNKS_IN_FLIGHT`` at once."""
    turn = asyncio.Semaphore(CHUNKS_IN_FLIGHT)

    async def one(item: Callable[[], Awaitable[T]]) -> T:
        async with turn:
            return await item()

    tasks = [asyncio.ensure_future(one(item)) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
