"""Pictures and videos that come in with a request, and from nowhere else: no URL is ever fetched.

Each is looked at before it goes on: its first bytes must be those of a kind that may come in, and
it must be whole and within the limit. What is small travels inside the message, the rest as a
blob.
"""

import asyncio
import base64
import binascii
from typing import Final

from gesso_contracts import limits
from gesso_contracts.blobs import Inline, Payload
from gesso_contracts.codec import shorten
from gesso_core.errors import InvalidRequest, UnreadableImage
from gesso_core.pipelines.pictures import decode_picture
from gesso_core.pipelines.videos import decode_video

from gesso_services.gateway.fabric import Fabric

# Inline bytes of one job in all: as base64 and with the words around them they fit its message.
INLINE_BYTES_PER_JOB: Final = limits.INLINE_JOB_BYTES // 2
INLINE_BYTES_PER_CALL: Final = limits.INLINE_RPC_BYTES

Signatures = tuple[tuple[bytes, int, bytes, str], ...]
# How the file starts, where a second mark is, that mark, and the media type.
PICTURES: Final[Signatures] = (
    (b"\x89PNG\r\n\x1a\n", 0, b"", "image/png"),
    (b"\xff\xd8\xff", 0, b"", "image/jpeg"),
    (b"RIFF", 8, b"WEBP", "image/webp"),
)
VIDEOS: Final[Signatures] = (
    (b"", 4, b"ftyp", "video/mp4"),
    (b"RIFF", 8, b"WEBP", "image/webp"),
    (b"GIF8", 0, b"", "image/gif"),
)


class Intake:
    """What one request brings along; ``inline_bytes`` of it in all may travel in the message."""

    def __init__(self, fabric: Fabric, *, inline_bytes: int) -> None:
        self.fabric = fabric
        self._left = inline_bytes

    async def picture(self, data: bytes, field: str) -> Payload:
        """A picture; UnreadableImage names ``field`` when it is none, or damaged, or too large."""
        await self.measure(data, field)
        return await self.pack_picture(data, field)

    async def pack_picture(self, data: bytes, field: str) -> Payload:
        """A picture that has been measured."""
        return await self.pack(data, sniff(data, field))

    async def measure(self, data: bytes, field: str) -> tuple[int, int]:
        """Height and width of a picture as it stands upright; raises like :meth:`picture`."""
        sniff(data, field)
        try:
            pixels = await asyncio.to_thread(
                decode_picture, data, max_pixels=self.fabric.settings.max_upload_pixels
            )
        except UnreadableImage as error:
            raise UnreadableImage(error.message, field=field) from error
        return pixels.shape[0], pixels.shape[1]

    async def video(self, data: bytes, field: str) -> Payload:
        """A video; UnreadableImage names ``field`` when it is none, or damaged, or too large."""
        try:
            await asyncio.to_thread(decode_video, data, 1)
        except InvalidRequest as error:
            raise UnreadableImage(error.message, field=field) from error
        media_type = _signed(data, VIDEOS)
        assert media_type is not None  # or it would not have been read
        return await self.pack(data, media_type)

    async def again(self, payload: Payload, field: str, *, video: bool = False) -> Payload:
        """A payload of a message that somebody wrote by hand: the same checks, the same packing."""
        if not isinstance(payload, Inline):
            return payload
        return await (self.video if video else self.picture)(payload.data, field)

    async def pack(self, data: bytes, media_type: str) -> Payload:
        """Bytes that have been looked at: in the message while there is room, else a blob."""
        packed = await self.fabric.blobs.pack(data, media_type, inline_limit=self._left)
        if isinstance(packed, Inline):
            self._left -= len(data)
        return packed


def sniff(data: bytes, field: str = "image") -> str:
    """The media type that the first bytes claim; UnreadableImage unless it may come in."""
    media_type = _signed(data, PICTURES)
    if media_type is None:
        raise UnreadableImage(
            f"these {len(data):,} bytes do not begin like a picture; send a PNG, JPEG or WebP file",
            field=field,
        )
    return media_type


def from_data_url(url: str, field: str) -> bytes:
    """The bytes of a ``data:`` URL; InvalidRequest for every other one."""
    head, _, data = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise InvalidRequest(
            f"{shorten(url)} is not a base64 data: URL, and this server opens no other; send the "
            "bytes themselves, like data:image/png;base64,iVBORw0…",
            field=field,
        )
    return from_base64(data, field)


def from_base64(text: str, field: str) -> bytes:
    """The bytes of standard base64; InvalidRequest when it is something else."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{shorten(text)} is not base64: {error}", field=field) from error


def _signed(data: bytes, signatures: Signatures) -> str | None:
    for start, place, mark, media_type in signatures:
        if data.startswith(start) and data[place : place + len(mark)] == mark:
            return media_type
    return None
