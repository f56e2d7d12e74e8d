"""Conversations about pictures, and judgements of them: requests and answers.

Pictures are PNG, JPEG or WebP bytes; a video is MP4, WebP or GIF bytes, of which the service takes
as many frames as its model looks at.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from gesso_contracts import limits
from gesso_contracts.base import Message, ModelName, Prompt
from gesso_contracts.blobs import Payload
from gesso_contracts.messages import TopP

FinishReason = Literal["stop", "length"]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=limits.STOP_CHARS)]


class TextPart(Message):
    """Words of a turn."""

    kind: Literal["text"] = "text"
    text: Annotated[str, StringConstraints(max_length=limits.PROMPT_CHARS)]


class ImagePart(Message):
    """A picture shown in a turn."""

    kind: Literal["image"] = "image"
    image: Payload


class VideoPart(Message):
    """A video shown in a turn."""

    kind: Literal["video"] = "video"
    video: Payload


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="kind")]


class Turn(Message):
    """What one side said and showed, in order."""

    role: Literal["system", "user", "assistant"]
    parts: list[Part] = Field(min_length=1, max_length=limits.MAX_PARTS)


class AnswerTurn(Message):
    """A conversation in, the next answer out; at temperature 0 the likeliest word each time."""

    model: ModelName
    turns: list[Turn] = Field(min_length=1, max_length=limits.MAX_TURNS)
    max_tokens: int = Field(default=64, ge=1, le=limits.MAX_ANSWER_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=limits.MAX_TEMPERATURE, allow_inf_nan=False)
    top_p: TopP = 1.0
    seed: int = Field(default=0, ge=0, lt=limits.SEED_LIMIT)
    stop: list[StopText] = Field(default_factory=list, max_length=limits.MAX_STOPS)

    @model_validator(mode="after")
    def _shows_no_more_than_fits(self) -> Self:
        shown = sum(part.kind != "text" for turn in self.turns for part in turn.parts)
        if shown > limits.MAX_SHOWN:
            raise ValueError(
                f"{shown} pictures and videos; a conversation may show at most {limits.MAX_SHOWN}"
            )
        return self


class TurnAnswered(Message):
    """The answer; ``length`` means that it was cut at ``max_tokens``."""

    text: str = Field(max_length=limits.ANSWER_CHARS)
    finish_reason: FinishReason
    prompt_tokens: int = Field(ge=0)
    answer_tokens: int = Field(ge=0)


class CheckJudgement(Message):
    """Can pictures be judged by this prompt? Asked before there are any."""

    model: ModelName
    prompt: Prompt


class JudgementChecked(Message):
    """Yes; ``tokens`` is what the model will read of each picture and the question about it."""

    tokens: int = Field(ge=1)


class JudgeImages(Message):
    """How well does each picture show what the prompt asks for?"""

    model: ModelName
    prompt: Prompt
    images: list[Payload] = Field(min_length=1, max_length=limits.PICTURES_PER_JUDGEMENT)


class ImagesJudged(Message):
    """One score per picture: the probability that the model says yes."""

    scores: list[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] = Field(
        min_length=1, max_length=limits.PICTURES_PER_JUDGEMENT
    )
