"""Results as Label Studio predictions: brush strokes (packed run lengths) or polygons in percent.

Brush masks are RGBA pictures packed by the run-length code of ``@thi.ng/rle-pack``: 32 bits for the
number of values, 5 for their width - 1, four times 4 for the widths of run lengths - 1; then per
run one bit (1: one value repeated), two for the width of its length, the length - 1, the value.
"""

from collections.abc import Iterable, Mapping
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
    file_name: str | None = None,
    shape: Shape = "brush",
    from_name: str = "label",
    to_name: str = "image",
    model_version: str = "char-sam",
) -> dict[str, Any]:
    """An importable task: the picture's address and one prediction with all regions.

    Args:
        image: what Label Studio shows: a ``data:`` URL, or the address of a file.
        file_name: kept beside it. The converters of Label Studio call a picture by what looks like
            a file, which a ``data:`` URL does not.
    """
    drawn = regions(result, shape=shape, from_name=from_name, to_name=to_name)
    prediction = {"model_version": model_version, "score": least_score(drawn), "result": drawn}
    data = {"image": image} if file_name is None else {"image": image, "file_name": file_name}
    return {"data": data, "predictions": [prediction]}


def regions(
    result: PictureResult, *, shape: Shape, from_name: str = "label", to_name: str = "image"
) -> list[dict[str, Any]]:
    """One region per character and per word; polygons give one per part, holes left out."""
    common = common_fields(result.size, from_name, to_name)
    found = []
    for number, word in enumerate(result.words):
        if word.annotation.ignore or not word.mask.area:
            continue
        found += _shapes(common, f"w{number}", "word", word, result.size, shape)
        for character in word.characters:
            name = f"w{number}c{character.index}"
            found += _shapes(common, name, "character", character, result.size, shape)
    return found


def least_score(drawn: Iterable[Mapping[str, Any]]) -> float:
    """The score of a prediction, that of its least sure region: such a task wants a person first.
    0 without regions.
    """
    return min((float(region["score"]) for region in drawn), default=0.0)


def common_fields(size: tuple[int, int], from_name: str, to_name: str) -> dict[str, Any]:
    """What every region of a picture of (H, W) says."""
    height, width = size
    return {
        "from_name": from_name,
        "to_name": to_name,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
    }


def pack_brush(mask: PlacedMask, size: tuple[int, int]) -> list[int]:
    """A mask in a picture of (H, W) as Label Studio's brush bytes, all four channels 0 or 255.

    Only the window is looked at, so that a small mask costs little in a large picture.
    """
    height, width = size
    edges_he = np.diff(mask.window_hw.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edges_he == 1)
    ends = np.nonzero(edges_he == -1)[1]
    first = (mask.y + rows) * width + mask.x
    bits = [f"{height * width * CHANNELS:032b}", f"{VALUE_BITS - 1:05b}"]
    bits += [f"{size - 1:04b}" for size in LENGTH_BITS]
    done = 0
    for start, end in zip((first + starts).tolist(), (first + ends).tolist(), strict=True):
        bits += _runs((start - done) * CHANNELS, 0)
        bits += _runs((end - start) * CHANNELS, 255)
        done = end
    bits += _runs((height * width - done) * CHANNELS, 0)
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def unpack_brush(packed: list[int], size: tuple[int, int]) -> Mask:
    """The mask in brush bytes, such as Label Studio exports once a person has corrected a brush:
    every pixel whose opacity is not zero.

    Raises InvalidRequest for bytes of another size than (H, W), and for bytes that end too early.
    """
    bits = _Bits("".join(f"{byte:08b}" for byte in packed))
    count = bits.number(32)
    if count != size[0] * size[1] * CHANNELS:
        raise InvalidRequest(
            f"the brush holds {count} values, a {size[1]}x{size[0]} picture has "
            f"{size[0] * size[1] * CHANNELS}",
            field="rle",
        )
    value_bits = bits.number(5) + 1
    widths = [bits.number(4) + 1 for _ in LENGTH_BITS]
    values, filled = np.zeros(count, dtype=np.uint8), 0
    while filled < count:
        repeated = bits.number(1)
        length = bits.number(widths[bits.number(2)]) + 1
        for _ in range(1 if repeated else length):
            run = length if repeated else 1
            values[filled : filled + run] = bits.number(value_bits)
            filled += run
    mask_HW: Mask = values.reshape(*size, CHANNELS)[..., -1] > 0
    return mask_HW


class _Bits:
    """Reads numbers out of a text of zeros and ones."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def number(self, width: int) -> int:
        """The next ``width`` bits."""
        begin, self.place = self.place, self.place + width
        if self.place > len(self.text):
            raise InvalidRequest("the brush ends before the picture is full", field="rle")
        return int(self.text[begin : self.place], 2)


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
    meta: dict[str, Any] = {"text": [text], "flags": list(labelled.flags)}
    if labelled.refused is not None:
        meta["refused"] = labelled.refused
    entry = {**common, "score": round(labelled.score, 4), "meta": meta}
    if shape == "brush":
        if not labelled.mask.area:
            return []
        value = {
            "format": "rle",
            "rle": pack_brush(labelled.mask, size),
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
