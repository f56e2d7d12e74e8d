"""Masks that were made before and stored as COCO run lengths, one file per picture."""

from pathlib import Path

from gesso_core.annotate.masks import decode_mask
from gesso_core.annotate.slf.scene import SegmentedObject
from gesso_core.errors import InvalidRequest
from gesso_core.safe_files import read_json


def read_stored_masks(path: Path, kinds: frozenset[str]) -> dict[int, SegmentedObject]:
    """The masks of these classes, by the 0-based line of the label that prompted them.

    The file holds ``masks``: a list of ``label_line``, ``type``, ``prompt`` (``xyxy``), ``size``,
    ``counts`` and ``predicted_iou``.

    Raises:
        InvalidRequest: a mask lacks an entry, or its run lengths are damaged.
    """
    found = {}
    for entry in read_json(path).get("masks", []):
        try:
            if entry["type"] not in kinds:
                continue
            left, top, right, bottom = map(float, entry["prompt"]["xyxy"])
            mask = decode_mask({"size": entry["size"], "counts": entry["counts"]})
            found[int(entry["label_line"])] = SegmentedObject(
                mask, (left, top, right, bottom), float(entry["predicted_iou"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{path}: a stored mask needs label_line, type, prompt.xyxy, size, counts and "
                f"predicted_iou ({error})",
                field="masks",
            ) from error
    return found
