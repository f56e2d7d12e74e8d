"""Bytes to pixels and back: encode PNG, JPEG and WebP, and open what a stranger sent.

``pixels_HWC`` is always a uint8 RGB array of shape (height, width, 3). Only Pillow and numpy are
used, so that the HTTP edge can check a picture without the models.
"""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from gesso_core.errors import InvalidRequest, UnreadableImage

PictureFormat = Literal["png", "jpeg", "webp"]
Pixels = NDArray[np.uint8]

MEDIA_TYPES = MappingProxyType({"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"})
MAX_PIXELS = 4096 * 4096
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# All that Pillow raises on damaged data, its own bomb guard included.
_DAMAGED: tuple[type[BaseException], ...] = (
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
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def encode_picture(pixels_HWC: Pixels, picture_format: str = "png", *, quality: int = 92) -> bytes:
    """The picture as a file. ``quality`` (1..100) counts for JPEG and lossy WebP, PNG is lossless.

    Raises InvalidRequest for a format other than png, jpeg or webp.
    """
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "png": lambda: {"compress_level": 6},
        "jpeg": lambda: {"quality": quality, "subsampling": 0},
        "webp": lambda: {"quality": quality, "method": 4},
    }
    if picture_format not in options:
        allowed = ", ".join(get_args(PictureFormat))
        raise InvalidRequest(
            f"unknown picture format {picture_format!r}; use one of {allowed}",
            field="output_format",
        )
    file = BytesIO()
    Image.fromarray(pixels_HWC).save(file, picture_format.upper(), **options[picture_format]())
    return file.getvalue()


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The pixels of an untrusted file: upright, RGB, transparency over white, first frame only.

    The size is read from the header and refused before any pixel is unpacked. Raises
    UnreadableImage for bytes that are no picture, for a damaged picture, and for one of more than
    ``max_pixels`` pixels.
    """
    try:
        with Image.open(BytesIO(data), formats=READABLE) as image:
            _refuse_large(image, max_pixels)
            return np.asarray(rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(
            f"the picture has far more than the {max_pixels:,} pixels allowed; send a smaller one",
            field="image",
        ) from error
    except _DAMAGED as error:
        kinds = ", ".join(READABLE)
        raise UnreadableImage(
            f"these {len(data):,} bytes are not a whole picture ({_reason(error)}); "
            f"send one of {kinds}",
            field="image",
        ) from error


def blank_picture(height: int, width: int) -> Pixels:
    """A gray picture, for trying things out."""
    return np.full((height, width, 3), 128, dtype=np.uint8)


def stretched(pixels_HWC: Pixels, height: int, width: int) -> Pixels:
    """The picture at exactly this size, whatever that does to its proportions."""
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    resized = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def covering(pixels_HWC: Pixels, height: int, width: int) -> Pixels:
    """The middle of the picture, scaled to cover exactly this size; proportions are kept."""
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    fitted = ImageOps.fit(Image.fromarray(pixels_HWC), (width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8)


def _refuse_large(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(
            f"the picture is {width}x{height}, {width * height:,} pixels; "
            f"at most {max_pixels:,} are allowed: send a smaller one",
            field="image",
        )


def rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: 16 bit gray is scaled, transparency lies over white."""
    if image.mode.startswith("I"):  # 16 bit gray: Pillow would clip instead of scale
        gray = np.asarray(image, dtype=np.float64)
        return Image.fromarray((gray / 257.0).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        straight = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), straight).convert(
            "RGB"
        )
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return "no known format" if isinstance(error, UnidentifiedImageError) else str(error)
