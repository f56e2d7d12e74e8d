"""Videos are written in three formats, and a stranger's video is looked at within limits."""

import itertools
import struct
from contextlib import suppress
from io import BytesIO

import av
import numpy as np
import pytest
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines import videos
from gesso_core.pipelines.pictures import encode_picture
from gesso_core.pipelines.videos import (
    Frames,
    VideoLimits,
    decode_video,
    encode_video,
    evenly,
)
from PIL import Image

FORMATS = ("mp4", "webp", "gif")


def clip(count: int = 5, height: int = 48, width: int = 64) -> Frames:
    """A white square that walks to the right over a gray that grows lighter."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    for index in range(count):
        frames[index] = 40 + 20 * index
        frames[index, 8:24, 8 * index : 8 * index + 16] = 250
    return frames


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(int) - right).mean())


@pytest.mark.parametrize("video_format", FORMATS)
def test_every_frame_comes_back_in_order(video_format: str) -> None:
    frames = clip()
    seen = decode_video(encode_video(frames, video_format), 8)
    assert len(seen) == 5
    for frame, shown in zip(frames, seen, strict=True):
        assert shown.shape == (48, 64, 3)
        assert distance(frame, shown) < 3
    assert distance(frames[0], seen[1]) > 10


@pytest.mark.parametrize("video_format", FORMATS)
def test_the_same_frames_are_the_same_bytes(video_format: str) -> None:
    assert encode_video(clip(), video_format) == encode_video(clip(), video_format)


def test_an_mp4_is_h264_in_yuv420p_at_the_rate_and_odd_sides_grow() -> None:
    data = encode_video(clip(height=33, width=47), "mp4", frames_per_s=12)
    with av.open(BytesIO(data)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (12, 5)
        assert (context.height, context.width) == (34, 48)
    assert distance(decode_video(data, 1)[0][:33, :47], clip(height=33, width=47)[2]) < 3


def test_animations_loop_and_keep_their_time() -> None:
    for video_format, delay_ms in (("webp", 125), ("gif", 120)):
        with Image.open(BytesIO(encode_video(clip(), video_format))) as image:
            image.load()
            assert (image.info["loop"], image.info["duration"]) == (0, delay_ms)


@pytest.mark.parametrize("video_format", FORMATS)
def test_of_a_long_video_evenly_spread_frames_are_looked_at(video_format: str) -> None:
    frames = np.stack([np.full((32, 32, 3), 10 * index, dtype=np.uint8) for index in range(25)])
    seen = decode_video(encode_video(frames, video_format), 4)
    assert [round(float(frame.mean()) / 10) for frame in seen] == [0, 8, 16, 24]


def test_evenly_takes_the_ends_and_no_frame_twice() -> None:
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(9, 1) == [4]
    for count in range(2, 40):
        indices = evenly(count, 8)
        assert (indices[0], indices[-1]) == (0, count - 1)
        assert len(set(indices)) == len(indices) == min(8, count)


def test_a_still_webp_is_a_video_of_one_frame_and_transparency_is_white() -> None:
    assert len(decode_video(encode_picture(clip()[0], "webp"), 8)) == 1
    file = BytesIO()
    clear, red = (Image.new("RGBA", (16, 16), color) for color in ("#0000", "#f00f"))
    clear.save(file, "GIF", save_all=True, append_images=[red], duration=100)
    first, second = decode_video(file.getvalue(), 8)
    assert first.min() == 255
    assert tuple(second[0, 0]) == (255, 0, 0)


def test_a_turned_phone_video_is_shown_upright() -> None:
    data = bytearray(encode_video(clip(height=32, width=64), "mp4"))
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes up to the matrix
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter)
    upright = decode_video(bytes(data), 1)[0]
    assert upright.shape == (64, 32, 3)
    assert distance(upright, np.rot90(clip(height=32, width=64)[2], -1)) < 3


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(data_bytes=100), "at most 100 are looked at"),
        (VideoLimits(pixels=1000), "64x48, 3,072 pixels a frame; at most 1,000"),
        (VideoLimits(frames=4), "more than 4 frames"),
        (VideoLimits(total_pixels=3 * 3072), "more than 3 frames of 64x48"),
        (VideoLimits(seconds=1e-9), "takes more than 1e-09 s to read; send a shorter"),
    ],
    ids=["bytes", "pixels", "frames", "total", "time"],
)
@pytest.mark.parametrize("video_format", FORMATS)
def test_a_video_over_a_limit_is_refused_with_the_limit(
    video_format: str, limits: VideoLimits, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        decode_video(encode_video(clip(), video_format), 8, limits=limits)
    assert refused.value.field == "video"


@pytest.mark.parametrize("video_format", FORMATS)
def test_the_time_is_looked_at_up_to_the_last_frame(
    video_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at this clock takes a second."""
    data = encode_video(clip(), video_format)
    ticks = itertools.count()
    monkeypatch.setattr(videos, "monotonic", lambda: float(next(ticks)))
    decode_video(data, 5, limits=VideoLimits(seconds=1000))
    looks = next(ticks) - 1  # the first one only begins
    assert looks >= 2 * len(clip())
    decode_video(data, 5, limits=VideoLimits(seconds=looks))
    for seconds in range(1, looks, 3):
        with pytest.raises(InvalidRequest, match=f"more than {seconds} s"):
            decode_video(data, 5, limits=VideoLimits(seconds=seconds))


PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk" * 100,
        PLAYLIST,
        CONCAT,
        b"GIF89a" + b"\0" * 50,
        b"RIFF\x10\0\0\0WEBPVP8 " + b"\0" * 30,
        b"\0\0\0\x18ftypisom" + b"\0" * 40,
        encode_video(clip(), "mp4")[:700],
        encode_picture(clip()[0], "png"),
    ],
    ids=["empty", "junk", "m3u8", "concat", "gif", "webp", "mp4", "cut mp4", "png"],
)
def test_what_is_no_video_is_refused_in_a_sentence(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="send an MP4, WebP or GIF") as refused:
        decode_video(data, 8)
    assert refused.value.field == "video"


def test_damage_anywhere_ends_in_a_sentence_or_in_frames() -> None:
    whole = {name: encode_video(clip(), name) for name in FORMATS}
    random = np.random.default_rng(0)
    for data in whole.values():
        for _ in range(60):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), 6):
                damaged[place] = random.integers(0, 256)
            with suppress(InvalidRequest):
                assert 1 <= len(decode_video(bytes(damaged), 3)) <= 3


def test_a_format_or_rate_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidRequest, match="use one of mp4, webp, gif"):
        encode_video(clip(), "avi")
    with pytest.raises(InvalidRequest, match="allowed are 1 to 60"):
        encode_video(clip(), "mp4", frames_per_s=0)
