"""Results of the core as messages, and back: what lies in the blob ``labels`` of a job.

The gateway reads them, too, so nothing here needs torch.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from gesso_contracts import annotations as a
from gesso_core.annotate.char_sam.window_runs import decode_placed, encode_placed
from gesso_core.annotate.char_sam.words import (
    FLAGS,
    CharacterMask,
    Flag,
    PictureResult,
    PlacedMask,
    WordAnnotation,
    WordResult,
    placed_polygon,
    summarize,
)
from gesso_core.annotate.kitti.calibration import parse_calibration
from gesso_core.annotate.kitti.labels import KittiObject
from gesso_core.annotate.kitti.writers import Labelled, LabelledFrame
from gesso_core.annotate.masks import Mask, encode_mask

Size = tuple[int, int]

_KNOWN_FLAGS: Final[dict[str, Flag]] = {name: name for name in FLAGS}  # type: ignore[misc]


def text_labels(result: PictureResult) -> a.TextLabels:
    """All words of a picture as a message."""
    height, width = result.size
    return a.TextLabels(
        width=width, height=height, words=[_word(word, result.size) for word in result.words]
    )


def picture_result(labels: a.TextLabels) -> PictureResult:
    """The inverse of `text_labels`, for the writers of data sets."""
    return PictureResult(
        size=(labels.height, labels.width),
        words=tuple(_word_result(word) for word in labels.words),
    )


def labelled_frame(labels: a.CarLabels, name: str) -> LabelledFrame:
    """The cars of a picture, for the writers of other tools' files."""
    found = [one.car for one in labels.objects if one.car is not None]
    return LabelledFrame(
        name=name,
        size=(labels.height, labels.width),
        calibration=parse_calibration(labels.calibration, name),
        objects=[Labelled(_kitti_object(car), tuple(car.flags)) for car in found],
    )


def text_summary(result: PictureResult) -> a.TextSummary:
    """Words and characters counted."""
    counted = summarize([result])
    characters = [c for word in result.words for c in word.characters if c.refused is None]
    return a.TextSummary(
        words=counted.words,
        labelled=counted.labelled,
        ignored=counted.ignored,
        characters=len(characters),
        flagged=dict(counted.flagged),
        refused=dict(counted.refused),
    )


def word_annotation(word: a.WordSpec) -> WordAnnotation:
    """A word of a request as the core takes it."""
    return WordAnnotation(
        text=word.text, polygon=tuple(word.polygon), script=word.script, ignore=word.ignore
    )


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs; a reason counts by its text up to the first colon."""
    return dict(sorted(Counter(name.partition(":")[0] for name in names).items()))


def mask_code(mask: PlacedMask, size: Size) -> a.MaskCode:
    """The run lengths of a mask that fills only its window of the picture."""
    return a.MaskCode.model_validate(encode_placed(mask, size))


def whole_code(mask_HW: Mask) -> a.MaskCode:
    """The run lengths of a mask of the whole picture."""
    return a.MaskCode.model_validate(encode_mask(mask_HW))


def placed_mask(code: a.MaskCode) -> PlacedMask:
    """The window of a coded mask; InvalidRequest when the runs do not fill the picture."""
    return decode_placed(code.counts, code.size)


def _word(word: WordResult, size: Size) -> a.AnnotatedWord:
    given = word.annotation
    return a.AnnotatedWord(
        text=given.text,
        polygon=list(given.polygon),
        script=given.script,
        ignore=given.ignore,
        source=given.source,
        confidence=given.confidence,
        mask=mask_code(placed_polygon(given.polygon, size) if given.ignore else word.mask, size),
        score=word.score,
        flags=list(word.flags),
        refused=word.refused,
        characters=[
            a.AnnotatedCharacter(
                char=character.char,
                index=character.index,
                box=character.box,
                quad=list(character.quad),
                mask=mask_code(character.mask, size),
                score=character.score,
                flags=list(character.flags),
                refused=character.refused,
            )
            for character in word.characters
        ],
    )


def _word_result(word: a.AnnotatedWord) -> WordResult:
    annotation = WordAnnotation(
        text=word.text,
        polygon=tuple(word.polygon),
        script=word.script,
        ignore=word.ignore,
        source=word.source,
        confidence=word.confidence,
    )
    return WordResult(
        annotation=annotation,
        characters=tuple(_character_mask(character) for character in word.characters),
        mask=placed_mask(word.mask),
        score=word.score,
        flags=_flags(word.flags),
        refused=word.refused,
    )


def _character_mask(character: a.AnnotatedCharacter) -> CharacterMask:
    return CharacterMask(
        char=character.char,
        index=character.index,
        box=character.box,
        quad=tuple(character.quad),
        mask=placed_mask(character.mask),
        score=character.score,
        flags=_flags(character.flags),
        refused=character.refused,
    )


def _kitti_object(car: a.AnnotatedCar) -> KittiObject:
    return KittiObject(
        kind=car.kind,
        truncated=car.truncated,
        occluded=car.occluded,
        alpha=car.alpha,
        box2d=car.box,
        size=car.size,
        location=car.location,
        rotation_y=car.rotation_y,
        score=car.score,
    )


def _flags(names: Iterable[str]) -> tuple[Flag, ...]:
    return tuple(_KNOWN_FLAGS[name] for name in names if name in _KNOWN_FLAGS)
