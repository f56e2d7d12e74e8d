"""Blobs come back as they were, or not at all."""

import random
from collections.abc import Awaitable, Callable

import pytest
from gesso_contracts import BlobRef, Inline, limits, subjects
from gesso_core.errors import InvalidRequest, NotFound, Unavailable
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.settings import Role

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

MIB = limits.MIB
Connect = Callable[[Role], Awaitable[Bus]]


@pytest.fixture
def blobs(gateway: Bus) -> BlobStore:
    return BlobStore(gateway)


@pytest.mark.parametrize("size", [0, 1, 1000, MIB - 1, MIB, MIB + 1, 20 * MIB])
async def test_a_blob_of_any_size_comes_back_as_it_was(
    blobs: BlobStore, connect: Connect, size: int
) -> None:
    data = random.Random(size).randbytes(size)
    ref = await blobs.put(data, "application/octet-stream", dtype="uint8", shape=(size,))
    assert (ref.size, ref.dtype, ref.shape) == (size, "uint8", (size,))
    assert await BlobStore(await connect("diffusion")).get(ref) == data


async def test_the_same_bytes_are_kept_once(blobs: BlobStore, connect: Connect) -> None:
    first = await blobs.put(b"paint" * 300_000, "image/png")
    second = await blobs.put(b"paint" * 300_000, "image/png")
    assert first == second
    stream = await (await connect("admin")).js.stream_info(subjects.STREAM_BLOBS)
    assert stream.state.messages == 2


async def test_a_corrupted_chunk_is_noticed(blobs: BlobStore, gateway: Bus) -> None:
    ref = await blobs.put(b"a" * (2 * MIB), "image/png")
    await gateway.js.publish(subjects.blob_chunk(ref.key, 1), b"b" * MIB)
    with pytest.raises(Unavailable, match="is damaged"):
        await blobs.get(ref)


async def test_a_missing_chunk_is_noticed(blobs: BlobStore, connect: Connect) -> None:
    ref = await blobs.put(b"a" * (2 * MIB), "image/png")
    admin = await connect("admin")
    await admin.js.purge_stream(subjects.STREAM_BLOBS, subject=subjects.blob_chunk(ref.key, 1))
    with pytest.raises(NotFound, match="is not there; blobs are kept for a limited time"):
        await blobs.get(ref)


async def test_a_deleted_blob_is_gone_and_deleting_twice_is_no_error(blobs: BlobStore) -> None:
    ref = await blobs.put(b"x", "image/png")
    await blobs.delete(ref)
    await blobs.delete(ref)
    with pytest.raises(NotFound):
        await blobs.get(ref)


async def test_a_payload_is_inline_when_small_and_a_blob_when_large(blobs: BlobStore) -> None:
    small = await blobs.pack(b"x" * 10, "image/png", inline_limit=10)
    large = await blobs.pack(b"x" * 11, "image/png", inline_limit=10)
    assert isinstance(small, Inline)
    assert isinstance(large, BlobRef)
    assert await blobs.read(small) == b"x" * 10
    assert await blobs.read(large) == b"x" * 11


async def test_a_blob_over_the_limit_is_refused(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_BYTES", 10)
    with pytest.raises(InvalidRequest, match="at most 10 bytes"):
        await blobs.put(b"x" * 11, "image/png")


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "a.b", "*", ">", "A" * 64, "0" * 63])
def test_a_key_is_a_hash_and_never_a_path(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        BlobRef(key=key, size=1, sha256="0" * 64, media_type="image/png")
