"""What a promptable segmenter is asked and what it answers, whichever network stands behind it.

    embedding = segmenter.embed(picture)                       # expensive, once per picture
    masks = segmenter.predict(embedding, [Prompt(box=b) for b in boxes])      # cheap, many at once

Coordinates are pixels of the picture: x to the right, y down, whole numbers on pixel edges, so that
a box (x0, y0, x1, y1) covers the columns x0 to x1 - 1 when its numbers are whole.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Box, Floats32, Point
from gesso_core.annotate.masks import Mask
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels

# P prompts   M candidate masks of one prompt   H, W the picture's size
# C channels   G side of the feature grid   L side of the low-resolution logits (256 for SAM)


OBJECT: Final = 1
BACKGROUND: Final = 0
MAX_SIDE: Final = 65_535  # as in JPEG; working memory grows with the sides of a picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """A picture as a segmenter sees it. Arrays are read-only by agreement: caches share them.

    Attributes:
        key: identifies picture and model together, see `embedding_key`.
        features_1CGG: the coarse features, (1, 256, 64, 64) for SAM.
        finer: further feature maps, finest first, of models whose decoder reads them (SAM 2).
        size: (H, W) of the picture.
        model, model_sha256: the segmenter that made it; no other may read it.
    """

    key: str
    features_1CGG: Floats32
    size: tuple[int, int]
    model: str
    model_sha256: str
    finer: tuple[Floats32, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return self.features_1CGG.nbytes + sum(array.nbytes for array in self.finer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What should be cut out: a box, points, a former mask, or any of them together.

    Attributes:
        box: around the object.
        points: (x, y) on the object or beside it.
        labels: one per point, `OBJECT` or `BACKGROUND`.
        mask_LL: ``low_res_PLL[p]`` of an earlier answer, to be improved.

    Raises InvalidRequest, naming the field, for a prompt that says nothing or contradicts itself.
    """

    box: Box | None = None
    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    mask_LL: Floats32 | None = None

    def __post_init__(self) -> None:
        if self.box is None and not self.points and self.mask_LL is None:
            raise InvalidRequest("an empty prompt; give a box, points or a mask", field="prompt")
        if self.box is not None:
            _check_box(self.box)
        if len(self.points) != len(self.labels):
            raise InvalidRequest(
                f"{len(self.points)} points but {len(self.labels)} labels; give one per point",
                field="labels",
            )
        if any(label not in (OBJECT, BACKGROUND) for label in self.labels):
            raise InvalidRequest(
                f"labels are {self.labels}; use 1 for the object and 0 for the background",
                field="labels",
            )
        if any(len(point) != 2 or not all(map(math.isfinite, point)) for point in self.points):
            raise InvalidRequest("a point needs two finite numbers, (x, y)", field="points")
        if self.mask_LL is not None:
            _check_mask(self.mask_LL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Every mask the decoder proposed per prompt, of which `Masks` holds number ``best_P``."""

    masks_PMHW: Mask
    low_res_PMLL: Floats32
    predicted_iou_PM: Floats32
    stability_PM: Floats32
    best_P: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """One mask per prompt, in the prompts' order.

    Attributes:
        masks_PHW: at the picture's size.
        low_res_PLL: logits, foreground above 0, to be given back as ``Prompt.mask_LL``.
        predicted_iou_P: the model's own opinion of the mask; it can be slightly above 1.
        stability_P: IoU of the mask cut at logit +1 with the mask cut at -1.
        candidates: all proposals, when several were asked for.
    """

    masks_PHW: Mask
    low_res_PLL: Floats32
    predicted_iou_P: Floats32
    stability_P: Floats32
    candidates: Candidates | None = None

    def __len__(self) -> int:
        return len(self.masks_PHW)

    def rows(self, order: Sequence[int]) -> "Masks":
        """The masks of these prompts, in this order."""
        found = self.candidates
        return Masks(
            **{name: array[order] for name, array in _arrays(self).items()},
            candidates=None
            if found is None
            else Candidates(**{name: array[order] for name, array in _arrays(found).items()}),
        )


class Segmenter(Protocol):
    """A model that cuts out what a prompt points at. Methods may be called from several threads."""

    @property
    def name(self) -> str:
        """The name it was loaded by."""

    @property
    def sha256(self) -> str:
        """Identity of the weights; an embedding belongs to exactly one."""

    def embed(self, picture_HW3: Pixels) -> Embedding:
        """Look at the picture once; the answer can be cached by `embedding_key`."""

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """One mask per prompt, all decoded together; no prompts give no masks.

        A lone box or a single point gets the best of three proposals by predicted IoU; a richer
        prompt gets the single-mask answer, which SAM trained for that. ``multimask`` chooses the
        best proposal always, and returns all of them in ``candidates``.

        Raises:
            InvalidRequest: an embedding of another model, a box that misses the picture, a point
                outside it.
        """


def joined(parts: Sequence[Masks]) -> Masks:
    """The masks of several answers about one picture, one after the other; at least one answer."""
    candidates = [part.candidates for part in parts if part.candidates is not None]
    return Masks(
        **_concatenated(parts),
        candidates=Candidates(**_concatenated(candidates)) if candidates else None,
    )


def embedding_key(picture_HW3: Pixels, model_sha256: str) -> str:
    """Name of an embedding: sha256 over the model's hash, the picture's shape and its pixels."""
    digest = hashlib.sha256(f"{model_sha256} {picture_HW3.shape}".encode())
    digest.update(np.ascontiguousarray(picture_HW3).data)
    return digest.hexdigest()


def check_picture(picture_HW3: Pixels) -> None:
    """Raise InvalidRequest unless this is a uint8 RGB picture of 1 to 65,535 pixels a side."""
    shape = picture_HW3.shape
    if picture_HW3.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise InvalidRequest(
            f"a picture is {picture_HW3.dtype} of shape {shape}; expected uint8 (height, width, 3)",
            field="image",
        )
    if max(shape) > MAX_SIDE:
        raise InvalidRequest(
            f"the picture is {shape[1]}x{shape[0]}; at most {MAX_SIDE:,} pixels a side",
            field="image",
        )


def check_prompts(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raise InvalidRequest for a box beside the picture or a point outside; says which prompt."""
    height, width = size
    for number, prompt in enumerate(prompts):
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise InvalidRequest(
                    f"the box {prompt.box} of prompt {number} lies outside the {width}x{height} "
                    "picture; boxes are (x0, y0, x1, y1) in pixels",
                    field="box",
                )
        for x, y in prompt.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise InvalidRequest(
                    f"the point ({x}, {y}) of prompt {number} lies outside the {width}x{height} "
                    "picture",
                    field="points",
                )


def _arrays(masks: Masks | Candidates) -> dict[str, Any]:
    return {f.name: getattr(masks, f.name) for f in fields(masks) if f.name != "candidates"}


def _concatenated(parts: Sequence[Masks] | Sequence[Candidates]) -> dict[str, Any]:
    split = [_arrays(part) for part in parts]
    return {name: np.concatenate([arrays[name] for arrays in split]) for name in split[0]}


def _check_box(box: Box) -> None:
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise InvalidRequest(
            f"a box needs four finite numbers (x0, y0, x1, y1), got {box}", field="box"
        )
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise InvalidRequest(
            f"the box {box} has no area; expected x0 < x1 and y0 < y1", field="box"
        )


def _check_mask(mask_LL: Floats32) -> None:
    shape = mask_LL.shape
    if len(shape) != 2 or shape[0] != shape[1] or not np.isfinite(mask_LL).all():
        raise InvalidRequest(
            f"a mask prompt has shape {shape}; expected a square of finite logits, the "
            "low-resolution logits of an earlier answer",
            field="mask",
        )
