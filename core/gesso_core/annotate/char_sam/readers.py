"""Words as the data sets write them: COCO-Text v2, ICDAR 2015 / MLT17 text files, our words.json.

Every error names the file's line or entry. ``###`` and illegible words are kept as ignored ones:
their area must not count against anybody.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from gesso_core.annotate.char_sam.words import TranscriptionSource, WordAnnotation
from gesso_core.annotate.geometry import Polygon
from gesso_core.errors import InvalidRequest

IGNORED = "###"
_ICDAR_NUMBERS = 8
# MLT17 names the script between coordinates and text.
MLT_SCRIPTS = frozenset(
    [
        "Arabic",
        "Latin",
        "Chinese",
        "Japanese",
        "Korean",
        "Bangla",
        "Hindi",
        "Symbols",
        "Mixed",
        "None",
    ]
)


def read_icdar(text: str, *, with_script: bool | None = None) -> list[WordAnnotation]:
    """The words of one ICDAR 2015 or MLT17 file: ``x1,y1,...,x4,y4[,script],text`` per line.

    Args:
        with_script: whether a script stands before the text; None looks for MLT17's names.

    Raises InvalidRequest naming the line that is not of this form.
    """
    words = []
    numbered = enumerate(text.lstrip("\ufeff").splitlines(), start=1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    scripted = with_script
    if scripted is None:
        scripted = bool(lines) and all(_script_field(line) for _, line in lines)
    for number, line in lines:
        fields = line.split(",", _ICDAR_NUMBERS + scripted)
        if len(fields) < _ICDAR_NUMBERS + 1 + scripted:
            raise InvalidRequest(
                f"line {number} has {len(fields)} fields: {line[:80]!r}; "
                "expected x1,y1,x2,y2,x3,y3,x4,y4,text",
                field=f"line {number}",
            )
        polygon = _points(fields[:_ICDAR_NUMBERS], f"line {number}")
        spoken = _unquoted(fields[-1].strip())
        script = fields[_ICDAR_NUMBERS].strip().lower() if scripted else None
        ignore = spoken in (IGNORED, "")
        words.append(WordAnnotation(text=spoken, polygon=polygon, script=script, ignore=ignore))
    return words


def read_coco_text(data: Mapping[str, Any]) -> dict[str, list[WordAnnotation]]:
    """The words of COCO-Text v2 by file name; illegible or untranscribed ones are ignored.

    ``mask`` is the polygon, and ``bbox`` (x, y, width, height) stands in where it is missing.
    """
    pictures = _mapping(data, "imgs")
    names = {str(key): str(entry.get("file_name", "")) for key, entry in pictures.items()}
    words: dict[str, list[WordAnnotation]] = {name: [] for name in names.values()}
    if "" in words:
        raise InvalidRequest("a picture of imgs has no file_name", field="imgs")
    for key, entry in _mapping(data, "anns").items():
        place = f"anns.{key}"
        picture = str(entry.get("image_id"))
        if picture not in names:
            raise InvalidRequest(
                f"{place} belongs to picture {picture}, which imgs does not have",
                field=f"{place}.image_id",
            )
        text = str(entry.get("utf8_string", ""))
        legible = entry.get("legibility", "legible") == "legible" and text.strip() != ""
        words[names[picture]].append(
            WordAnnotation(
                text=text,
                polygon=_coco_polygon(entry, place),
                script="latin" if entry.get("language") == "english" else None,
                ignore=not legible,
            )
        )
    return words


def read_words_json(data: Sequence[Mapping[str, Any]]) -> dict[str, list[WordAnnotation]]:
    """Our own form: a list of ``{image, words: [{text, polygon, script?, ignore?, source?}]}``.

    ``source`` (given, or ocr) comes with ``confidence``.
    """
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise InvalidRequest("expected a list of pictures with their words", field="words.json")
    words = {}
    for number, entry in enumerate(data):
        if (
            not isinstance(entry, Mapping)
            or "image" not in entry
            or not isinstance(entry.get("words"), list)
        ):
            raise InvalidRequest(
                f"entry {number} is {_shown(entry)}; expected image and a list of words",
                field=f"[{number}]",
            )
        words[str(entry["image"])] = [
            _own_word(word, f"[{number}].words[{place}]")
            for place, word in enumerate(entry["words"])
        ]
    return words


def words_to_json(pictures: Mapping[str, Sequence[WordAnnotation]]) -> list[dict[str, Any]]:
    """The inverse of `read_words_json`: what a ``words.json`` of one's own holds."""
    return [
        {"image": name, "words": [asdict(word) for word in words]}
        for name, words in pictures.items()
    ]


def load_json(path: Path) -> Any:
    """A JSON file; raises InvalidRequest with the place where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as JSON: {error}", field=path.name) from error


def _own_word(word: Mapping[str, Any], place: str) -> WordAnnotation:
    if not isinstance(word, Mapping) or "polygon" not in word or "text" not in word:
        raise InvalidRequest(f"{place} is {_shown(word)}; expected text and polygon", field=place)
    polygon = word["polygon"]
    if not isinstance(polygon, list) or not all(
        isinstance(point, list) and len(point) == 2 for point in polygon
    ):
        raise InvalidRequest(
            f"{place}.polygon is {_shown(polygon)}; expected a list of points [x, y]",
            field=f"{place}.polygon",
        )
    text, source = str(word["text"]), word.get("source", "given")
    if source not in get_args(TranscriptionSource):
        raise InvalidRequest(
            f"{place}.source is {_shown(source)}; expected one of "
            f"{', '.join(get_args(TranscriptionSource))}",
            field=f"{place}.source",
        )
    ((confidence, _),) = _points([word.get("confidence", 1.0), 0], f"{place}.confidence")
    script = word.get("script")
    return WordAnnotation(
        text=text,
        polygon=_points([number for point in polygon for number in point], f"{place}.polygon"),
        script=None if script is None else str(script),
        ignore=bool(word.get("ignore", text == IGNORED)),
        source=source,
        confidence=confidence,
    )


def _coco_polygon(entry: Mapping[str, Any], place: str) -> Polygon:
    numbers = entry.get("mask")
    if isinstance(numbers, list) and len(numbers) >= _ICDAR_NUMBERS:
        return _points(numbers, f"{place}.mask")
    box = entry.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4:
        raise InvalidRequest(
            f"{place} has neither a polygon of 4 points nor a bbox [x, y, width, height]",
            field=f"{place}.bbox",
        )
    (x, y), (width, height) = _points(box, f"{place}.bbox")
    return ((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def _points(numbers: Sequence[Any], place: str) -> Polygon:
    """Points of a flat list of coordinates."""
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{place}: {error}; coordinates are numbers of pixels", field=place
        ) from error
    if len(values) % 2:
        raise InvalidRequest(
            f"{place} has {len(values)} numbers; expected x and y of each point", field=place
        )
    return tuple(zip(values[::2], values[1::2], strict=True))


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(part, Mapping) or not all(isinstance(e, Mapping) for e in part.values()):
        raise InvalidRequest(
            f"no table {key!r}: COCO-Text v2 has imgs and anns, each by id", field=key
        )
    return part


def _shown(value: object) -> str:
    return repr(sorted(value) if isinstance(value, Mapping) else value)[:80]


def _script_field(line: str) -> bool:
    fields = line.split(",", _ICDAR_NUMBERS + 1)
    return len(fields) == _ICDAR_NUMBERS + 2 and fields[_ICDAR_NUMBERS].strip() in MLT_SCRIPTS


def _unquoted(text: str) -> str:
    """Text without the quotation marks that some ICDAR files put around it."""
    quoted = len(text) >= 2 and text[0] == text[-1] == '"'
    return text[1:-1] if quoted else text
