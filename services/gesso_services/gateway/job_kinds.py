"""``PUT /v1/jobs/{id}``: the kinds of jobs that a person may submit, told apart by ``kind``."""

import json
from typing import Annotated, Any, Literal

from gesso_contracts import (
    AnnotateCars,
    AnnotateText,
    AnswerTurn,
    DrawSigns,
    GenerateImage,
    GenerateVideo,
    VaryImage,
)
from gesso_contracts.base import Message
from pydantic import BeforeValidator, Discriminator, Tag

from gesso_services.gateway.schemas import Body


def _strict(message: type[Message]) -> BeforeValidator:
    """A message of the bus, taken as strictly as the rest of a body: no text for a number.

    It is read as JSON, where a pair of numbers is a list.
    """

    def check(value: Any) -> Any:
        text = json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
        return message.model_validate_json(text, strict=True)

    return BeforeValidator(check)


class GenerateImageJob(Body):
    """One picture from text."""

    kind: Literal["generate-image"] = "generate-image"
    request: Annotated[GenerateImage, _strict(GenerateImage)]


class VaryImageJob(Body):
    """One picture from a picture and text."""

    kind: Literal["vary-image"]
    request: Annotated[VaryImage, _strict(VaryImage)]


class GenerateVideoJob(Body):
    """One short video from text."""

    kind: Literal["generate-video"]
    request: Annotated[GenerateVideo, _strict(GenerateVideo)]


class AnswerJob(Body):
    """The next turn of a conversation."""

    kind: Literal["answer"]
    request: Annotated[AnswerTurn, _strict(AnswerTurn)]


class AnnotateTextJob(Body):
    """Masks for the characters of words."""

    kind: Literal["annotate-text"]
    request: Annotated[AnnotateText, _strict(AnnotateText)]


class AnnotateCarsJob(Body):
    """Boxes in space for cars."""

    kind: Literal["annotate-cars"]
    request: Annotated[AnnotateCars, _strict(AnnotateCars)]


class DrawSignsJob(Body):
    """Signs drawn, written on and labelled."""

    kind: Literal["draw-signs"]
    request: Annotated[DrawSigns, _strict(DrawSigns)]


def _tag(value: Any) -> str:
    """In brackets, so that it is not taken for the name of a field where an error is told."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind or 'generate-image'}>"


AnyJob = Annotated[
    Annotated[GenerateImageJob, Tag("<generate-image>")]
    | Annotated[VaryImageJob, Tag("<vary-image>")]
    | Annotated[GenerateVideoJob, Tag("<generate-video>")]
    | Annotated[AnswerJob, Tag("<answer>")]
    | Annotated[AnnotateTextJob, Tag("<annotate-text>")]
    | Annotated[AnnotateCarsJob, Tag("<annotate-cars>")]
    | Annotated[DrawSignsJob, Tag("<draw-signs>")],
    Discriminator(
        _tag,
        custom_error_type="unknown_kind",
        custom_error_message="kind must be 'generate-image', 'vary-image', 'generate-video', "
        "'answer', 'annotate-text', 'annotate-cars' or 'draw-signs'",
    ),
]
