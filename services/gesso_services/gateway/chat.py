"""``/v1/chat/completions``: questions about pictures and videos, answered word by word.

Behind each answer is a job of the kind ``answer``. Its events carry the whole answer so far; a
stream sends what is new of it.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from gesso_contracts import AnswerTurn, JobStateChanged, JobText, TurnAnswered
from gesso_core.errors import GessoError

from gesso_services.gateway import conversation, orders, streams
from gesso_services.gateway.admission import Door, open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.chat_schemas import (
    AnswerChoice,
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Usage,
)
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.orders import IdempotencyKey, Order
from gesso_services.gateway.painting import Claim
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.uploads import INLINE_BYTES_PER_JOB, Intake
from gesso_services.runtime.job_events import Event

PATH: Final = "/v1/chat/completions"
DONE: Final = streams.event(None, "[DONE]")
router = APIRouter(tags=["chat"])


@router.post(
    PATH,
    response_model=ChatCompletion,
    responses=documented(
        400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507, ok={"content": streams.DOCUMENTED}
    ),
    dependencies=[Depends(open_place)],
)
async def complete(
    *,
    body: ChatRequest,
    request: Request,
    caller: Caller,
    fabric: Here,
    models: Models,
    door: Door,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Answer the last message of a conversation, in which pictures and videos may be shown as
    `data:` URLs. With `stream` the answer comes as server-sent events, the last of them `[DONE]`.
    """
    served = await models.find(conversation.KIND, body.model)
    claim = Claim(caller=caller, idempotency_key=idempotency_key)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_JOB)
    async with door.admitted(served.service):
        order = await conversation.plan(body, served, claim, intake)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return streams.EventStream(_stream(fabric, order, usage=usage))
    states = await orders.while_connected(request, orders.fulfil(fabric, order))
    if states is None:
        return Response(status_code=499)  # nobody is there to read it
    return _completion(order, orders.result_of(states[0], TurnAnswered))


def _completion(order: Order[AnswerTurn], answer: TurnAnswered) -> ChatCompletion:
    job_id, turn = order.jobs[0]
    message = AnswerMessage(content=answer.text)
    return ChatCompletion(
        id=job_id,
        created=int(time.time()),
        model=turn.model,
        choices=[AnswerChoice(message=message, finish_reason=answer.finish_reason)],
        usage=_usage(answer),
    )


async def _stream(
    fabric: Fabric, order: Order[AnswerTurn], *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """The words as they come, until ``[DONE]`` or one error."""
    writer = _Writer(order, usage=usage)
    try:
        yield writer.role()
        async with aclosing(orders.events(fabric, order)) as events:
            async for item in events:
                if item is None:
                    yield streams.HEARTBEAT
                elif (chunk := writer.write(item[1])) is not None:
                    yield chunk
        yield writer.end()
    except GessoError as error:
        yield streams.failure(error)


class _Writer:
    """Bus events as chunks of OpenAI's stream."""

    def __init__(self, order: Order[AnswerTurn], *, usage: bool) -> None:
        self.job_id, turn = order.jobs[0]
        self.model, self.created, self.usage = turn.model, int(time.time()), usage
        self._said = ""
        self._answer: TurnAnswered | None = None

    def role(self) -> bytes:
        """The first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def write(self, event: Event) -> bytes | None:
        """What is new of the answer, if anything."""
        if isinstance(event, JobText):
            return self._more(event.text)
        if isinstance(event, JobStateChanged) and event.state.status == "succeeded":
            self._answer = orders.result_of(event.state, TurnAnswered)
            return self._more(self._answer.text, last=True)
        return None

    def end(self) -> bytes:
        """Why the answer ends, what it took, and the end of the stream."""
        assert self._answer is not None  # without it the stream has ended with an error
        last = self._chunk({}, self._answer.finish_reason)
        if self.usage:
            last += self._event(choices=[], usage=_usage(self._answer).model_dump())
        return last + DONE

    def _more(self, text: str, *, last: bool = False) -> bytes | None:
        if not text.startswith(self._said):
            if last:
                raise EdgeError(
                    503,
                    "answer_began_anew",
                    "the service was restarted and answered in other words than those already "
                    "sent; ask again",
                )
            return None  # an event that was overtaken, or an answer that begins anew
        new, self._said = text[len(self._said) :], text
        return self._chunk({"content": new}) if new else None

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event(choices=[choice], **({"usage": None} if self.usage else {}))

    def _event(self, **more: Any) -> bytes:
        about = {"id": self.job_id, "object": "chat.completion.chunk", "created": self.created}
        return streams.event(None, {**about, "model": self.model, **more})


def _usage(answer: TurnAnswered) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.answer_tokens,
        total_tokens=answer.prompt_tokens + answer.answer_tokens,
    )
