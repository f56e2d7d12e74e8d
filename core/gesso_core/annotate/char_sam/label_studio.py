"""Results as Label Studio predictions: brush strokes (packed run lengths) or polygons in percent.

Brush masks are RGBA pictures packed by the run-length code of ``@thi.ng/rle-pack``: 32 bits for the
number of values, 5 for their width - 1, four times 4 for the widths of run lengths - 1; then per
run one bit (1: one value repeated), two for the width of its length, the length - 1, the value.
"""

from typing import Any, Literal

import numpy as np

from gesso_core.annotate.char_sam.outlines import outlines
from gesso_core.annotate.char_sam.words import (
    CharacterMask,
    PictureResult,
    PlacedMask,
    WordResult,
    signed_area,
)
from gesso_core.annotate.masks import Mask
from gesso_core.errors import InvalidRequest

LENGTH_BITS = (3, 4, 8, 16)
VALUE_BITS = 8
CHANNELS = 4
Shape = Literal["brush", "polygon"]


def task(
    image: str,
    result: PictureResult,
    *,
    shape: Shape = "brush",
    from_name: str = "label",
    to_name: str = "image",
    model_version: str = "char-sam",
) -> dict[str, Any]:
    """An importable task: the picture's address and one prediction with all regions."""
    prediction = {
        "model_version": model_version,
        "score": min((word.score for word in result.words if word.characters), default=0.0),
        "result": regions(result, shape=shape, from_name=from_name, to_name=to_name),
    }
    return {"data": {"image": image}, "predictions": [prediction]}


def regions(
    result: PictureResult, *, shape: Shape, from_name: str = "label", to_name: str = "image"
) -> list[dict[str, Any]]:
    """One region per character and per word; polygons give one per part, holes left out."""
    height, width = result.size
    common = {
        "from_name": from_name,
        "to_name": to_name,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
    }
    found = []
    for number, word in enumerate(result.words):
        if word.annotation.ignore or not word.mask.area:
            continue
        found += _shapes(common, f"w{number}", "word", word, result.size, shape)
        for character in word.characters:
            name = f"w{number}c{character.index}"
            found += _shapes(common, name, "character", character, result.size, shape)
    return found


def pack_brush(mask_HW: Mask) -> list[int]:
    """A mask as Label Studio's brush bytes, all four channels 0 or 255."""
    flat = mask_HW.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [flat.size]])) * CHANNELS
    bits = [f"{flat.size * CHANNELS:032b}", f"{VALUE_BITS - 1:05b}"]
    bits += [f"{size - 1:04b}" for size in LENGTH_BITS]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        bits += _runs(length, 255 if flat[start] else 0)
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def unpack_brush(packed: list[int], size: tuple[int, int]) -> Mask:
    """The mask in brush bytes: every pixel whose opacity is not zero.

    Raises InvalidRequest for bytes of another size than (H, W).
    """
    bits = "".join(f"{byte:08b}" for byte in packed)
    count, place = int(bits[:32], 2), 32
    if count != size[0] * size[1] * CHANNELS:
        raise InvalidRequest(
            f"the brush holds {count} values, a {size[1]}x{size[0]} picture has "
            f"{size[0] * size[1] * CHANNELS}",
            field="rle",
        )
    value_bits, place = int(bits[place : place + 5], 2) + 1, place + 5
    widths = [int(bits[place + 4 * k : place + 4 * k + 4], 2) + 1 for k in range(4)]
    place += 16
    values, filled = np.zeros(count, dtype=np.uint8), 0
    while filled < count:
        repeated, width = bits[place] == "1", widths[int(bits[place + 1 : place + 3], 2)]
        place += 3
        length, place = int(bits[place : place + width], 2) + 1, place + width
        for _ in range(1 if repeated else length):
            run = length if repeated else 1
            values[filled : filled + run] = int(bits[place : place + value_bits], 2)
            filled, place = filled + run, place + value_bits
    mask_HW: Mask = values.reshape(*size, CHANNELS)[..., -1] > 0
    return mask_HW


def _runs(length: int, value: int) -> list[str]:
    """The bits of one run; runs longer than 65,536 are split."""
    bits = []
    while length > 0:
        part = min(length, 1 << LENGTH_BITS[-1])
        place = next(k for k, size in enumerate(LENGTH_BITS) if part <= 1 << size)
        bits.append(f"1{place:02b}{part - 1:0{LENGTH_BITS[place]}b}{value:0{VALUE_BITS}b}")
        length -= part
    return bits


def _shapes(
    common: dict[str, Any],
    name: str,
    label: str,
    labelled: CharacterMask | WordResult,
    size: tuple[int, int],
    shape: Shape,
) -> list[dict[str, Any]]:
    text = labelled.char if isinstance(labelled, CharacterMask) else labelled.annotation.text
    entry = {
        **common,
        "score": round(labelled.score, 4),
        "meta": {"text": [text], "flags": list(labelled.flags)},
    }
    if shape == "brush":
        value = {
            "format": "rle",
            "rle": pack_brush(labelled.mask.paint(size)),
            "brushlabels": [label],
        }
        return [{**entry, "id": name, "type": "brushlabels", "value": value}]
    return [
        {
            **entry,
            "id": f"{name}p{part}",
            "type": "polygonlabels",
            "value": {"points": points, "closed": True, "polygonlabels": [label]},
        }
        for part, points in enumerate(_percent(labelled.mask, size))
    ]


def _percent(mask: PlacedMask, size: tuple[int, int]) -> list[list[list[float]]]:
    """Outer outlines in percent of the picture."""
    height, width = size
    loops = outlines(mask, tolerance=0.5)
    # find_contours walks parts and holes in opposite directions; the largest loop is a part.
    sign = np.sign(signed_area(loops[0])) if loops else 0
    return [
        [[100 * x / width, 100 * y / height] for x, y in loop]
        for loop in loops
        if np.sign(signed_area(loop)) == sign
    ]
