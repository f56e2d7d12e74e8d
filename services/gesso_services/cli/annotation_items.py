"""What is annotated, and by whom: pictures with words, KITTI frames with prompts, and a server."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from gesso_core.annotate.char_sam.readers import (
    IGNORED,
    load_json,
    read_coco_text,
    read_icdar,
    read_words_json,
)
from gesso_core.annotate.char_sam.words import WordAnnotation
from gesso_core.annotate.kitti.dataset import KittiFrame, open_folder
from gesso_core.annotate.pictures import open_picture
from gesso_core.errors import InvalidRequest

from gesso_services.cli.annotated_folder import Item, Made
from gesso_services.client import Gesso
from gesso_services.client_wire import Json

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
_UNFIT: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
Words = Callable[[str], Sequence[WordAnnotation] | None]


def text_items(path: Path, words: Words, *, apart_from: Path) -> Iterator[Item]:
    """The picture, or all those in a folder and the folders in it, by name, without what lies in
    the folder ``apart_from``.
    """
    root = path.parent if path.is_file() else path
    for place in [path] if path.is_file() else pictures_in(path, apart_from):
        name = place.relative_to(root).as_posix()
        yield Item(name, partial(_text_parts, place, name, words))


def pictures_in(path: Path, apart_from: Path) -> list[Path]:
    """Every picture below a folder but not below the other; InvalidRequest when there is none."""
    if not path.is_dir():
        raise InvalidRequest(f"{path} is neither a picture nor a folder of pictures", field="path")
    output = apart_from.resolve()
    found = sorted(
        place
        for place in path.rglob("*")
        if place.suffix.lower() in PICTURES
        and place.is_file()
        and not place.resolve().is_relative_to(output)
    )
    if not found:
        raise InvalidRequest(f"{path} has no {', '.join(PICTURES)} file", field="path")
    return found


def words_from(source: Path | None) -> Words:
    """Who knows the words of a picture: our words.json, a file of COCO-Text, or a folder with a
    text file of ICDAR per picture (``gt_NAME.txt`` or ``NAME.txt``). Without a source, nobody.

    Words that are known without the folder of their picture go to one picture of that name alone.
    """
    if source is None:
        return lambda name: None
    taken: dict[str, str] = {}
    if source.is_dir():
        return partial(_icdar_words, source, taken)
    data = load_json(source)
    known = read_coco_text(data) if isinstance(data, dict) else read_words_json(data)

    def words(name: str) -> Sequence[WordAnnotation]:
        for key in (name, Path(name).name):
            if key in known:
                _take(taken, key, name)
                return known[key]
        raise InvalidRequest(f"{source} has no entry for {name}", field="words")

    return words


def car_items(path: Path, frames: Sequence[str], prompts: Path | None) -> Iterator[Item]:
    """The frames of a KITTI folder, all or those named; prompts from a JSON file, which has a list
    per frame, or else the boxes of the cars in ``label_2``.
    """
    given = None if prompts is None else load_json(prompts)
    if given is not None and not isinstance(given, dict):
        raise InvalidRequest(
            f'{prompts} must be an object like {{"000001": [{{"box": [x0, y0, x1, y1]}}]}}',
            field="prompts",
        )
    found = list(open_folder(path))
    unknown = set(frames) - {frame.name for frame in found}
    if unknown:
        raise InvalidRequest(f"{path} has no frame {', '.join(sorted(unknown))}", field="frames")
    for frame in found:
        if not frames or frame.name in frames:
            yield Item(frame.name, partial(_car_parts, frame, given))


@dataclass(frozen=True)
class ServerText:
    """Words to characters by a server; ``options`` are those of the route."""

    gesso: Gesso
    options: Json

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        """Submit the picture."""
        words = words_in(parts)
        name = Path(item.name).name
        begun = self.gesso.begin_text(parts["image"], words, name=name, key=key, **self.options)
        return begun.id

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        """Wait for the labels, and fetch the picture to look at."""
        answer = self.gesso.labels(name)
        return text_made(item, answer, self.gesso.drawing(name))


@dataclass(frozen=True)
class ServerCars:
    """Cars to boxes in space by a server."""

    gesso: Gesso
    options: Json

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        """Submit the frame; one without prompts has nothing to submit."""
        prompts = json.loads(parts["prompts"])
        if not prompts:
            return ""
        begun = self.gesso.begin_cars(
            parts["image"],
            calibration_in(parts),
            prompts,
            parts.get("points"),
            name=f"{item.name}.png",
            key=key,
            **self.options,
        )
        return begun.id

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        """Wait for the labels, and fetch what there is to look at."""
        if not name:
            return no_cars(item, parts)
        answer = self.gesso.labels(name) | {"calibration": calibration_in(parts)}
        files = {
            f"label_2/{item.name}.txt": self.gesso.export(name, "kitti"),
            f"overlays/{item.name}.png": self.gesso.drawing(name, "overlay"),
            f"birds_eye/{item.name}.png": self.gesso.drawing(name, "birds-eye"),
        }
        if answer.get("meshes"):
            files[f"meshes/{item.name}.glb"] = self.gesso.drawing(name, "meshes")
        if answer.get("occupancy"):
            files[f"occupancy/{item.name}.ply"] = self.gesso.drawing(name, "occupancy")
        return cars_made(item, answer, files)


def text_made(item: Item, answer: Json, drawn: bytes) -> Made:
    """The files of one picture, and what the writers of data sets need to know beforehand."""
    labels = {name: answer[name] for name in ("width", "height", "words")}
    characters = sorted(
        {
            character["char"]
            for word in answer["words"]
            for character in word["characters"]
            if character["refused"] is None
        }
    )
    return Made(
        files={
            f"labels/{item.name}.json": _json(labels),
            f"overlays/{item.name}.png": drawn,
        },
        note={
            "width": answer["width"],
            "height": answer["height"],
            "characters": characters,
            "summary": answer["summary"],
        },
    )


def cars_made(item: Item, answer: Json, files: dict[str, bytes]) -> Made:
    """The files of one frame, and what became of its prompts."""
    kept = ("width", "height", "calibration", "objects")
    labels = {name: answer[name] for name in kept}
    note = {name: answer[name] for name in ("cars", "refused", "flagged")}
    return Made(files | {f"labels/{item.name}.json": _json(labels)}, note)


def no_cars(item: Item, parts: Mapping[str, bytes]) -> Made:
    """A frame without prompts: an empty label file."""
    height, width = open_picture(parts["image"]).shape[:2]
    answer: Json = {
        "width": width,
        "height": height,
        "calibration": calibration_in(parts),
        "objects": [],
        "cars": 0,
        "refused": {},
        "flagged": {},
    }
    return cars_made(item, answer, {f"label_2/{item.name}.txt": b""})


def calibration_in(parts: Mapping[str, bytes]) -> str:
    """The text of the calibration among the parts of a frame."""
    return parts["calibration"].decode("utf-8", errors="replace")


def words_in(parts: Mapping[str, bytes]) -> list[Json] | None:
    """The words among the parts of an item."""
    if "words" not in parts:
        return None
    words: list[Json] = json.loads(parts["words"])
    return words


def _text_parts(place: Path, name: str, words: Words) -> dict[str, bytes]:
    _check_name(name)
    known, parts = words(name), {"image": place.read_bytes()}
    if known is not None:
        parts["words"] = _json([_word(word) for word in known])
    return parts


def _word(word: WordAnnotation) -> Json:
    nothing = word.ignore and not word.text.strip()
    return {
        "text": IGNORED if nothing else word.text,
        "polygon": [list(point) for point in word.polygon],
        "script": word.script,
        "ignore": word.ignore,
    }


def _take(taken: dict[str, str], key: str, name: str) -> None:
    """Note whose words these are; InvalidRequest when they are those of another picture."""
    first = taken.setdefault(key, name)
    if first != name:
        raise InvalidRequest(
            f"the words of {key} were taken for {first} already, so {name} has none; give pictures "
            "names of their own, or words.json their folders",
            field="words",
        )


def _icdar_words(folder: Path, taken: dict[str, str], name: str) -> list[WordAnnotation]:
    stem = Path(name).stem
    for place in (folder / f"gt_{stem}.txt", folder / f"{stem}.txt"):
        if place.is_file():
            _take(taken, place.name, name)
            return _read_icdar(place)
    raise InvalidRequest(f"{folder} has neither gt_{stem}.txt nor {stem}.txt", field="words")


def _read_icdar(place: Path) -> list[WordAnnotation]:
    try:
        return read_icdar(place.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{place} is not UTF-8 (byte {error.start}); save it in that encoding", field="words"
        ) from error


def _check_name(name: str) -> None:
    """InvalidRequest for a name that no file of labels could carry, like bytes that are no text."""
    if _UNFIT.search(name):
        raise InvalidRequest(
            f"{name!r} has control characters or bytes that are no UTF-8; rename it", field="name"
        )


def _car_parts(frame: KittiFrame, given: Mapping[str, Any] | None) -> dict[str, bytes]:
    _check_name(frame.name)
    frame.calibration()  # a missing or malformed file is named before anything is sent
    parts = {
        "image": frame.picture_path.read_bytes(),
        "calibration": (frame.root / "calib" / f"{frame.name}.txt").read_bytes(),
        "prompts": _json(_prompts(frame, given)),
    }
    if frame.has_points:
        parts["points"] = (frame.root / "velodyne" / f"{frame.name}.bin").read_bytes()
    return parts


def _prompts(frame: KittiFrame, given: Mapping[str, Any] | None) -> list[Json]:
    if given is not None:
        prompts = given.get(frame.name, [])
        if not isinstance(prompts, list):
            raise InvalidRequest(
                f"the prompts of {frame.name} are {prompts!r:.80}; expected a list of them",
                field="prompts",
            )
        return prompts
    from gesso_core.annotate.slf.prior import PRIORS  # with torch, which words do without

    return [{"box": list(car.box2d)} for car in frame.labels() if car.kind in PRIORS]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
