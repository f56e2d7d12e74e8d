"""From OpenAI's messages to the turns of a conversation, and from a request to its one job."""

from typing import Any, Final

from gesso_contracts import AnswerTurn, ImagePart, TextPart, Turn, VideoPart, limits
from gesso_contracts.conversations import Part
from gesso_core.errors import InvalidRequest

from gesso_services.gateway import orders
from gesso_services.gateway.catalog import Served
from gesso_services.gateway.chat_schemas import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    ImageContent,
    TextContent,
)
from gesso_services.gateway.orders import Order
from gesso_services.gateway.painting import Claim
from gesso_services.gateway.uploads import Intake, from_data_url

KIND: Final = "answer"


async def plan(
    body: ChatRequest, served: Served, claim: Claim, intake: Intake
) -> Order[AnswerTurn]:
    """The job that answers ``body``. The same key from the same caller gives the same id."""
    check(body)
    name, drawn = orders.name_and_seed(claim.caller, claim.idempotency_key, "chatcmpl")
    given: dict[str, Any] = {
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
    }
    turn = AnswerTurn(
        model=served.name,
        turns=[await _turn(message, index, intake) for index, message in enumerate(body.messages)],
        seed=drawn if body.seed is None else body.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    return Order(
        service=served.service,
        kind=KIND,
        jobs=((name, turn),),
        lasting=claim.idempotency_key is not None,
    )


def check(body: ChatRequest) -> None:
    """InvalidRequest for what no field alone shows to be wrong."""
    most = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(most) > 1:
        raise InvalidRequest(
            f"max_tokens {body.max_tokens} and max_completion_tokens {body.max_completion_tokens} "
            "contradict each other; send one of them",
            field="max_tokens",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options without stream; set stream to true, or leave them out",
            field="stream_options",
        )
    _check_messages(body.messages)


def _check_messages(messages: list[ChatMessage]) -> None:
    last = len(messages) - 1
    if messages[last].role != "user":
        raise InvalidRequest(
            f"the conversation ends with a message of the role {messages[last].role!r}; the last "
            "one has to be the user's, which is then answered",
            field=f"messages.{last}.role",
        )
    shown = 0
    for index, message in enumerate(messages):
        parts = [] if isinstance(message.content, str) else message.content
        media = [part for part in parts if not isinstance(part, TextContent)]
        shown += len(media)
        field = f"messages.{index}.content"
        if media and message.role != "user":
            raise InvalidRequest(
                f"a message of the role {message.role!r} shows a picture; only a user's may",
                field=field,
            )
        if not media and not _words(message).strip():
            raise InvalidRequest(
                "the message says and shows nothing; send words, a picture, or both", field=field
            )
    if shown > limits.MAX_SHOWN:
        raise InvalidRequest(
            f"{shown} pictures and videos; a conversation may show at most {limits.MAX_SHOWN}",
            field="messages",
        )


def _words(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return " ".join(part.text for part in message.content if isinstance(part, TextContent))


async def _turn(message: ChatMessage, index: int, intake: Intake) -> Turn:
    parts: list[Part]
    if isinstance(message.content, str):
        parts = [TextPart(text=message.content)]
    else:
        field = f"messages.{index}.content"
        parts = [
            await _part(part, f"{field}.{place}", intake)
            for place, part in enumerate(message.content)
        ]
    return Turn(role="system" if message.role == "developer" else message.role, parts=parts)


async def _part(part: ContentPart, field: str, intake: Intake) -> Part:
    if isinstance(part, TextContent):
        return TextPart(text=part.text)
    if isinstance(part, ImageContent):
        field += ".image_url.url"
        return ImagePart(
            image=await intake.picture(from_data_url(part.image_url.url, field), field)
        )
    field += ".video_url.url"
    return VideoPart(video=await intake.video(from_data_url(part.video_url.url, field), field))
