"""Short videos as bytes: write MP4, WebP and GIF, and look at what a stranger sent.

``frames_THWC`` is always a uint8 RGB array of shape (frames, height, width, 3). Only PyAV, Pillow
and numpy are used, so that the HTTP edge can check a video without the models.

A stranger's bytes are read from memory, by the one reader that their first bytes call for: no
playlist, no address and no other container is ever followed.
"""

# T frames   H height   W width   C channels

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from time import monotonic
from types import MappingProxyType
from typing import Final, Literal, get_args

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray
from PIL import Image

from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels, rgb, stretched

VideoFormat = Literal["mp4", "webp", "gif"]
Frames = NDArray[np.uint8]

MEDIA_TYPES = MappingProxyType({"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"})
MAX_FRAMES_PER_S: Final = 60
SHORTEST_GIF_DELAY_MS: Final = 20  # shorter ones are played as 100 ms by most viewers
# Almost lossless for drawn pictures, and one thread so that the bytes never differ.
H264: Final = {"crf": "16", "preset": "medium", "threads": "1"}
CODECS: Final = ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg")
SEALED: Final = {"protocol_whitelist": "", "enable_drefs": "0", "use_absolute_path": "0"}

# All that Pillow and FFmpeg raise on damaged data.
_DAMAGED: tuple[type[BaseException], ...] = (
    av.FFmpegError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """The largest video that is looked at; ``pixels`` of one frame, ``total_pixels`` of all, and
    the ``seconds`` that reading it may take.
    """

    data_bytes: int = 64 * 2**20
    pixels: int = 4096 * 2304
    frames: int = 3000
    total_pixels: int = 2**31
    seconds: float = 30.0


def encode_video(frames_THWC: Frames, video_format: str = "mp4", *, frames_per_s: int = 8) -> bytes:
    """The video as a file: H.264 in MP4 (odd sides grow by one pixel), animated WebP, or GIF.

    WebP and GIF keep equal neighbours as one frame that stays longer. Raises InvalidRequest for
    another format or rate.
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or 0 in frames_THWC.shape:
        raise ValueError(f"frames of shape {frames_THWC.shape}; expected (T, H, W, 3)")
    if not 1 <= frames_per_s <= MAX_FRAMES_PER_S:
        raise InvalidRequest(
            f"{frames_per_s} frames per second; allowed are 1 to {MAX_FRAMES_PER_S}",
            field="frames_per_s",
        )
    if video_format not in get_args(VideoFormat):
        raise InvalidRequest(
            f"unknown video format {video_format!r}; use one of {', '.join(MEDIA_TYPES)}",
            field="output_format",
        )
    if video_format == "mp4":
        return _mp4(frames_THWC, frames_per_s)
    return _animation(frames_THWC, video_format, frames_per_s)


def decode_video(data: bytes, most_frames: int, *, limits: VideoLimits | None = None) -> Frames:
    """At most ``most_frames`` frames of an untrusted MP4, WebP or GIF, evenly from first to last.

    A video with fewer frames gives all of them; a still picture is a video of one. A frame of
    another size than the first is stretched to that. Raises
    InvalidRequest for other bytes, for a damaged video, and for one over ``limits``. The time is
    looked at between packets and between frames.
    """
    limits = limits or VideoLimits()
    if len(data) > limits.data_bytes:
        raise _refused(
            f"the video has {len(data):,} bytes; at most {limits.data_bytes:,} are looked at: "
            "send a shorter or smaller one"
        )
    reader, watch = _reader(data), _Watch(limits)
    try:
        frames = list(reader(data, most_frames, watch))
    except InvalidRequest:
        raise
    except _DAMAGED as error:
        reason = "no decodable frame" if isinstance(error, EOFError) else str(error)
        raise _refused(
            f"these {len(data):,} bytes are not a whole video ({reason}); send an MP4, WebP or GIF"
        ) from error
    if not frames:
        raise _refused("the video has no frame that can be decoded; send an MP4, WebP or GIF")
    height, width = frames[0].shape[:2]
    return np.stack([stretched(frame, height, width) for frame in frames])


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` indices of ``count`` frames, first and last included, evenly spread."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _mp4(frames_THWC: Frames, frames_per_s: int) -> bytes:
    bottom, right = (side % 2 for side in frames_THWC.shape[1:3])
    frames_THWC = np.pad(frames_THWC, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", frames_per_s, options=dict(H264))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames_THWC:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def _animation(frames_THWC: Frames, video_format: str, frames_per_s: int) -> bytes:
    first, *others = (Image.fromarray(frame_HWC) for frame_HWC in frames_THWC)
    delay_ms = round(1000 / frames_per_s)
    options: dict[str, int] = {"quality": 92, "method": 4}
    if video_format == "gif":  # hundredths of a second
        delay_ms, options = max(SHORTEST_GIF_DELAY_MS, round(delay_ms / 10) * 10), {}
    file = BytesIO()
    first.save(
        file,
        video_format.upper(),
        save_all=True,
        append_images=others,
        duration=delay_ms,
        loop=0,
        **options,
    )
    return file.getvalue()


class _Watch:
    """Refuses a video that turns out larger, or takes longer to read, than the limits allow."""

    def __init__(self, limits: VideoLimits) -> None:
        self.limits = limits
        self._until = monotonic() + limits.seconds

    def check_time(self) -> None:
        """Is there time left?"""
        if monotonic() > self._until:
            raise _refused(
                f"the video takes more than {self.limits.seconds:g} s to read; send a shorter or "
                "smaller one"
            )

    def check(self, width: int, height: int, count: int) -> None:
        """So many frames of that size: is there time left, and are they within the limits?"""
        self.check_time()
        limits, pixels = self.limits, width * height
        if pixels > limits.pixels:
            raise _refused(
                f"the video is {width}x{height}, {pixels:,} pixels a frame; at most "
                f"{limits.pixels:,} are looked at: send a smaller one"
            )
        if count > limits.frames or count * pixels > limits.total_pixels:
            most = min(limits.frames, limits.total_pixels // max(1, pixels))
            raise _refused(
                f"the video has more than {most} frames of {width}x{height}; send a shorter one"
            )


def _reader(data: bytes) -> Callable[[bytes, int, _Watch], Iterator[Pixels]]:
    if data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _read_animation
    if data[4:8] == b"ftyp":
        return _read_mp4
    raise _refused(
        f"these {len(data):,} bytes are not a video of a known format; send an MP4, WebP or GIF"
    )


def _read_mp4(data: bytes, most: int, watch: _Watch) -> Iterator[Pixels]:
    # FFmpeg calls MP4 and its relatives "mov"; naming it keeps every other reader out.
    with av.open(BytesIO(data), "r", format="mov", options=dict(SEALED)) as container:
        size = _decoder(container)
        watch.check(size.width, size.height, 1)
        count = 0
        for packet in container.demux(video=0):
            count += packet.size > 0
            watch.check(size.width, size.height, count)
    chosen = set(evenly(count, most))
    with av.open(BytesIO(data), "r", format="mov", options=dict(SEALED)) as container:
        for index, frame in enumerate(_decoded(container, watch)):
            watch.check(frame.width, frame.height, 1)  # it may change on the way
            if index in chosen:
                pixels = frame.to_ndarray(format="rgb24")
                yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _decoded(container: InputContainer, watch: _Watch) -> Iterator[av.VideoFrame]:
    """Every frame. Many packets may come without one, so the time is looked at before each."""
    for packet in container.demux(video=0):
        watch.check_time()
        yield from packet.decode()


def _decoder(container: InputContainer) -> VideoCodecContext:
    streams = container.streams.video
    # A damaged header leaves a track without a decoder, whatever the types say.
    decoder: VideoCodecContext | None = streams[0].codec_context if streams else None
    if decoder is None or decoder.codec.canonical_name not in CODECS:
        raise _refused(
            f"the file has no video in one of {', '.join(CODECS)}; send an MP4, WebP or GIF"
        )
    return decoder


def _read_animation(data: bytes, most: int, watch: _Watch) -> Iterator[Pixels]:
    with Image.open(BytesIO(data), formats=("GIF", "WEBP")) as image:
        count = _count(image, watch)
    with Image.open(BytesIO(data), formats=("GIF", "WEBP")) as image:
        chosen = evenly(count, most)
        for index in range(chosen[-1] + 1):  # one by one, because that is how Pillow gets there
            watch.check_time()
            image.seek(index)
            if index in chosen:
                yield np.asarray(rgb(image), dtype=np.uint8)


def _count(image: Image.Image, watch: _Watch) -> int:
    count = 0
    while True:
        watch.check(image.width, image.height, count + 1)
        try:
            image.seek(count + 1)
        except EOFError:
            return count + 1
        count += 1


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="video")
