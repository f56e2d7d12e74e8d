"""Picture files: what is written can be read, and what a stranger sends cannot hurt."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from gesso_core.errors import InvalidRequest, UnreadableImage
from gesso_core.pipelines.pictures import MEDIA_TYPES, decode_picture, encode_picture
from PIL import Image


def gradient(height: int = 24, width: int = 40) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 10, columns * 6, (rows + columns) * 3], axis=-1).astype(np.uint8)


def png_with_header_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises ``width`` x ``height`` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, picture_format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, picture_format, **options)
    return file.getvalue()


def test_a_png_comes_back_bit_for_bit() -> None:
    pixels = gradient()
    assert np.array_equal(decode_picture(encode_picture(pixels, "png")), pixels)


@pytest.mark.parametrize("picture_format", ["jpeg", "webp"])
def test_a_lossy_file_comes_back_close(picture_format: str) -> None:
    pixels = gradient()
    again = decode_picture(encode_picture(pixels, picture_format, quality=95))
    assert again.shape == pixels.shape
    assert np.abs(again.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("picture_format", sorted(MEDIA_TYPES))
def test_the_file_is_what_its_media_type_says(picture_format: str) -> None:
    data = encode_picture(gradient(), picture_format)
    assert Image.open(BytesIO(data)).get_format_mimetype() == MEDIA_TYPES[picture_format]


def test_an_unknown_output_format_is_refused_with_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="'tga'; use one of png, jpeg, webp") as refusal:
        encode_picture(gradient(), "tga")
    assert refusal.value.field == "output_format"


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (decode_picture(saved(image)) == 255).all()


def test_a_palette_with_transparency_lies_over_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    assert (decode_picture(saved(image, transparency=0)) == 255).all()


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16))
    assert (decode_picture(saved(image)) == 100).all()


def test_the_camera_orientation_is_applied() -> None:
    image = Image.fromarray(gradient(24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    assert decode_picture(saved(image, "JPEG", exif=exif)).shape == (40, 24, 3)


def test_cmyk_and_animation_become_one_rgb_frame() -> None:
    assert decode_picture(saved(Image.new("CMYK", (6, 5)), "JPEG")).shape == (5, 6, 3)
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(animated)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7 not a picture", b"<svg></svg>"],
    ids=["nothing", "text", "signature-only", "pdf", "svg"],
)
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match="not a whole picture") as refusal:
        decode_picture(data)
    assert refusal.value.field == "image"


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_picture_is_refused(picture_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encode_picture(noise, picture_format)
    with pytest.raises(UnreadableImage, match="not a whole picture"):
        decode_picture(data[: int(len(data) * share)])


def test_a_picture_over_the_limit_is_refused_by_its_header() -> None:
    with pytest.raises(UnreadableImage, match="9000x9000, 81,000,000 pixels; at most 16,777,216"):
        decode_picture(png_with_header_size(9000, 9000))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    with pytest.raises(UnreadableImage, match="allowed"):
        decode_picture(png_with_header_size(side, side))


def test_the_limit_itself_is_allowed() -> None:
    assert decode_picture(encode_picture(gradient(8, 8)), max_pixels=64).shape == (8, 8, 3)
    with pytest.raises(UnreadableImage, match="at most 63"):
        decode_picture(encode_picture(gradient(8, 8)), max_pixels=63)


def test_flipped_bytes_give_a_picture_or_a_refusal() -> None:
    data = encode_picture(gradient(), "png")
    refused = 0
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        try:
            assert decode_picture(bytes(damaged)).ndim == 3
        except UnreadableImage:
            refused += 1
    assert refused > 0
