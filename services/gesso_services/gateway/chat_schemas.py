"""Bodies of ``/v1/chat/completions``: OpenAI's, as far as a model that sees can follow them.

A field that is not here is refused by its name; fields that ask for nothing (``n`` of 1, penalties
of 0) are taken, because clients send them.
"""

from typing import Annotated, Any, Literal

from gesso_contracts import limits
from gesso_contracts.base import ModelName
from gesso_contracts.conversations import FinishReason, StopText
from gesso_contracts.messages import TopP
from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag

from gesso_services.gateway.schemas import NOT_USED, Body, Seed

Text = Annotated[str, StringConstraints(max_length=limits.PROMPT_CHARS)]
TokenCount = Annotated[int, Field(ge=1, le=limits.MAX_ANSWER_TOKENS)]
DataUrl = Annotated[str, Field(description="a base64 data: URL; no other URL is opened")]


class ImageUrl(Body):
    """A picture inside the request."""

    url: DataUrl
    detail: Literal["auto", "low", "high"] | None = Field(None, description=NOT_USED)


class VideoUrl(Body):
    """A video inside the request."""

    url: DataUrl


class TextContent(Body):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageContent(Body):
    """A picture, PNG, JPEG or WebP."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoContent(Body):
    """A video, MP4, WebP or GIF; the model looks at as many of its frames as it was made for."""

    type: Literal["video_url"]
    video_url: VideoUrl


def _type(value: Any) -> str:
    """In brackets, so that it is not taken for the name of a field where an error is told."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


ContentPart = Annotated[
    Annotated[TextContent, Tag("<text>")]
    | Annotated[ImageContent, Tag("<image_url>")]
    | Annotated[VideoContent, Tag("<video_url>")],
    Discriminator(
        _type,
        custom_error_type="unknown_type",
        custom_error_message="type must be 'text', 'image_url' or 'video_url'",
    ),
]
Parts = Annotated[list[ContentPart], Field(min_length=1, max_length=limits.MAX_PARTS)]
Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Parts, Tag("<list>")], Discriminator(_text_or_list)
]
Stops = Annotated[list[StopText], Field(max_length=limits.MAX_STOPS)]


class ChatMessage(Body):
    """One turn of the conversation; only a user shows pictures."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, max_length=100, description=NOT_USED)
    refusal: None = Field(None, description="as it comes in answers")


class StreamOptions(Body):
    """What a stream tells beside the words."""

    include_usage: bool = False


class PlainText(Body):
    """The only form of an answer."""

    type: Literal["text"]


class ChatRequest(Body):
    """``POST /v1/chat/completions``; what is left out takes the model's own default."""

    model: ModelName | None = Field(None, description="default: the first model that sees")
    messages: list[ChatMessage] = Field(min_length=1, max_length=limits.MAX_TURNS)
    max_tokens: TokenCount | None = Field(None, description="the older name")
    max_completion_tokens: TokenCount | None = None
    temperature: float | None = Field(
        None,
        ge=0,
        le=limits.MAX_TEMPERATURE,
        allow_inf_nan=False,
        description="default 0: the likeliest word each time",
    )
    top_p: TopP | None = None
    seed: Seed | None = Field(None, description="drawn by the gateway when left out")
    stop: (
        Annotated[
            Annotated[StopText, Tag("<text>")] | Annotated[Stops, Tag("<list>")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    stream: bool | None = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions | None = Field(None, description="with `stream`")
    n: int | None = Field(1, ge=1, le=1, description="one answer")
    presence_penalty: float | None = Field(0, ge=0, le=0)
    frequency_penalty: float | None = Field(0, ge=0, le=0)
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    user: str | None = Field(None, max_length=200, description=NOT_USED)


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class AnswerChoice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class Usage(BaseModel):
    """Tokens, pictures included as the model counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """OpenAI's answer; ``id`` is also the id of the job behind it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix seconds")
    model: str
    choices: list[AnswerChoice]
    usage: Usage
    system_fingerprint: str | None = None
