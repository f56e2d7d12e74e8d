"""``gesso annotate --local``: words and cars in this process, without a server."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gesso_contracts import CarPrompt, TextLabels, WordSpec
from gesso_contracts.annotations import Words
from gesso_contracts.codec import contract_error
from gesso_core.annotate.char_sam.ocr import WheelReader
from gesso_core.annotate.char_sam.overlay import overlay
from gesso_core.annotate.char_sam.pipeline import CharSam, CharSamOptions
from gesso_core.annotate.kitti.calibration import parse_calibration
from gesso_core.annotate.kitti.dataset import parse_points
from gesso_core.annotate.kitti.labels import format_labels
from gesso_core.annotate.pictures import open_picture
from gesso_core.annotate.segmenter.contract import Segmenter
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.annotate.slf.prior import ShapePrior, load_prior
from gesso_core.annotate.slf.results import FittedCar
from gesso_core.annotate.slf.scene import Refused, SlfOptions
from gesso_core.errors import InvalidRequest, Unavailable
from gesso_core.pipelines.pictures import encode_picture
from pydantic import TypeAdapter, ValidationError

from gesso_services.annotation_cars import Frame, Wanted, annotate_frame, car_prompt, written
from gesso_services.annotation_labels import counted, text_labels, text_summary
from gesso_services.annotation_text import annotate_words, words_of
from gesso_services.cli.annotated_folder import Item, Made
from gesso_services.cli.annotation_items import (
    calibration_in,
    cars_made,
    no_cars,
    text_made,
    words_in,
)
from gesso_services.client_wire import Json

_WORDS: TypeAdapter[list[WordSpec]] = TypeAdapter(Words)
_PROMPTS = TypeAdapter(list[CarPrompt])


@dataclass(frozen=True)
class LocalText:
    """Words to characters, one picture after the other."""

    options: Json

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        """Nothing happens before it is waited for."""
        return key

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        """Annotate the picture."""
        picture, given = open_picture(parts["image"]), words_in(parts)
        specs = None if given is None else _checked(_WORDS, given, "words")
        options = CharSamOptions(**{k: v for k, v in self.options.items() if v is not None})
        words = words_of(specs, picture, self.annotator)
        result = annotate_words(self.annotator, picture, words, options, _nobody)
        labels: TextLabels = text_labels(result)
        summary = text_summary(result).model_dump(mode="json")
        drawn = encode_picture(overlay(picture, result))
        return text_made(item, labels.model_dump(mode="json") | {"summary": summary}, drawn)

    @cached_property
    def annotator(self) -> CharSam:
        """Char-SAM on the default segmenter, with a reader where one is installed."""
        try:
            reader = WheelReader()
        except Unavailable:
            return CharSam(load_segmenter())
        return CharSam(load_segmenter(), reader=reader)


@dataclass(frozen=True)
class LocalCars:
    """Cars to boxes in space, one frame after the other."""

    options: Json

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        """Nothing happens before it is waited for."""
        return key

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        """Annotate the frame."""
        prompts = _checked(_PROMPTS, json.loads(parts["prompts"]), "prompts")
        if not prompts:
            return no_cars(item, parts)
        frame = Frame(
            open_picture(parts["image"]),
            parse_calibration(calibration_in(parts)),
            parse_points(parts["points"]) if "points" in parts else None,
        )
        options = SlfOptions(driving_side=self.options["driving_side"])
        asked = [car_prompt(prompt) for prompt in prompts]
        objects, outcomes = annotate_frame(
            self.segmenter, frame, asked, self.prior, options, _nobody
        )
        wanted = Wanted(bool(self.options["meshes"]), self.options["occupancy"])
        files = written(frame, objects, outcomes, self.prior, wanted)
        cars = [outcome for outcome in outcomes if isinstance(outcome, FittedCar)]
        labels: Json = json.loads(files.labels)
        labels |= {
            "cars": len(cars),
            "refused": counted(one.reason for one in outcomes if isinstance(one, Refused)),
            "flagged": counted(str(flag) for car in cars for flag in car.flags),
        }
        made = {
            f"label_2/{item.name}.txt": format_labels(car.label for car in cars).encode(),
            f"overlays/{item.name}.png": files.overlay,
            f"birds_eye/{item.name}.png": files.birds_eye,
        }
        if files.meshes is not None:
            made[f"meshes/{item.name}.glb"] = files.meshes
        if files.occupancy is not None:
            made[f"occupancy/{item.name}.ply"] = files.occupancy
        return cars_made(item, labels, made)

    @cached_property
    def segmenter(self) -> Segmenter:
        """The default one."""
        return load_segmenter()

    @cached_property
    def prior(self) -> ShapePrior:
        """The shapes of cars."""
        return load_prior()


def _nobody(step: int, total: int) -> None:
    """Is told how far a picture is."""


def _checked(adapter: TypeAdapter[Any], value: Any, field: str) -> Any:
    """A list as the server would take it; InvalidRequest names the first wrong entry."""
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        wrong = contract_error(error, field)
        place = f"{field}.{wrong.field}" if wrong.field else field
        raise InvalidRequest(str(wrong), field=place) from error
