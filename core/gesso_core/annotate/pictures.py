"""Pictures that come in for annotation, whatever camera, scanner or program wrote them."""

from pathlib import Path
from typing import Final

from gesso_core.errors import UnreadableImage
from gesso_core.pipelines.pictures import MAX_PIXELS, Pixels, decode_picture

MAX_BYTES: Final = 256 * 1024 * 1024


def open_picture(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Pixels:
    """A picture as uint8 RGB (H, W, 3), upright.

    16 bit samples are scaled to 8, CMYK, gray and palettes become RGB, transparency lies over
    white, the rotation that a camera noted is carried out. Coordinates of annotations count in the
    picture as it is returned.

    Args:
        source: a file, or the bytes of one.
        max_pixels: H times W; read from the header, before anything is unpacked.
        max_bytes: of the file.

    Raises:
        UnreadableImage: no file, too large, no picture, or a damaged one; names the file.
    """
    if isinstance(source, bytes):
        _refuse_heavy("the picture", len(source), max_bytes)
        return decode_picture(source, max_pixels=max_pixels)
    try:
        _refuse_heavy(str(source), source.stat().st_size, max_bytes)
        data = source.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot read {source}: {error.strerror}", field="image") from error
    try:
        return decode_picture(data, max_pixels=max_pixels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{source}: {error.message}", field="image") from error


def _refuse_heavy(what: str, size: int, most: int) -> None:
    if size > most:
        raise UnreadableImage(
            f"{what} has {size:,} bytes; at most {most:,} are read", field="image"
        )
