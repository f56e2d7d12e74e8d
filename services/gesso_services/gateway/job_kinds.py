"""``PUT /v1/jobs/{id}``: the kinds of jobs that a person may submit, told apart by ``kind``."""

from typing import Annotated, Any, Literal

from gesso_contracts import AnswerTurn, GenerateImage, GenerateVideo, VaryImage
from gesso_contracts.base import Message
from pydantic import BeforeValidator, Discriminator, Tag

from gesso_services.gateway.schemas import Body


def _strict(message: type[Message]) -> BeforeValidator:
    """A message of the bus, taken as strictly as the rest of a body: no text for a number."""

    def check(value: Any) -> Any:
        return message.model_validate(value, strict=True)

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


def _tag(value: Any) -> str:
    """In brackets, so that it is not taken for the name of a field where an error is told."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind or 'generate-image'}>"


AnyJob = Annotated[
    Annotated[GenerateImageJob, Tag("<generate-image>")]
    | Annotated[VaryImageJob, Tag("<vary-image>")]
    | Annotated[GenerateVideoJob, Tag("<generate-video>")]
    | Annotated[AnswerJob, Tag("<answer>")],
    Discriminator(
        _tag,
        custom_error_type="unknown_kind",
        custom_error_message="kind must be 'generate-image', 'vary-image', 'generate-video' or "
        "'answer'",
    ),
]
