"""Pictures of every kind become uint8 RGB, upright; what is no picture is named."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.pictures import open_picture
from gesso_core.errors import UnreadableImage
from PIL import Image


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_png(samples_HW3: np.ndarray) -> bytes:
    """A PNG with 16 bits per sample, which Pillow reads and cannot write."""
    height, width, _ = samples_HW3.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_HW3)

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_sixteen_bits_become_eight() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    assert np.abs(open_picture(deep_png(samples)) - samples / 257).max() < 1.01
    gray = Image.fromarray(samples[..., 0].astype(np.uint16))
    assert np.abs(open_picture(saved(gray))[..., 1] - samples[..., 0] / 257).max() < 1.01


def test_cmyk_becomes_rgb() -> None:
    cyan = Image.new("CMYK", (8, 4), (255, 0, 0, 0))
    pixels = open_picture(saved(cyan, "JPEG", quality=100))
    assert pixels.shape == (4, 8, 3)
    assert np.abs(pixels[0, 0].astype(int) - (0, 255, 255)).max() < 12


def test_a_noted_rotation_is_carried_out() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    noted = Image.Exif()
    noted[0x0112] = 6  # to be turned a quarter clockwise
    turned = open_picture(saved(Image.fromarray(pixels), exif=noted.tobytes()))
    assert np.array_equal(turned, np.rot90(pixels, k=-1))


def test_transparency_lies_over_white() -> None:
    glass = Image.new("RGBA", (3, 2), (200, 0, 0, 0))
    assert (open_picture(saved(glass)) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_gray_and_palettes_become_rgb(mode: str) -> None:
    pixels = open_picture(saved(Image.new("RGB", (3, 2), "white").convert(mode)))
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == 255).all()


def test_a_file_is_opened_and_its_faults_name_it(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)))
    good.write_bytes(data)
    bad.write_bytes(data[:60])
    assert np.array_equal(open_picture(good), open_picture(data))
    with pytest.raises(UnreadableImage, match=r"bad\.png: .*not a whole picture"):
        open_picture(bad)
    with pytest.raises(UnreadableImage, match=r"cannot read .*none\.png"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match="cannot read"):
        open_picture(tmp_path)


def test_size_limits_hold_for_pixels_and_for_bytes() -> None:
    data = saved(Image.new("RGB", (40, 30)))
    with pytest.raises(UnreadableImage, match="at most 1,199"):
        open_picture(data, max_pixels=1199)
    with pytest.raises(UnreadableImage, match="at most 20 are read"):
        open_picture(data, max_bytes=20)
