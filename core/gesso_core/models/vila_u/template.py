"""Prompts: how a conversation becomes token ids with places for pictures.

A template is data. `VICUNA_V1` is that of the published models: a system sentence, then turns
``USER: …`` and ``ASSISTANT: …</s>``. `SHORT` leaves the sentence out, for models that never saw it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.models.vila_u.splice import IGNORED, IMAGE_PLACEHOLDER

PLACEHOLDER: Final = "<image>"
CAPTION_QUESTION: Final = "describe the picture"
JUDGE_QUESTION: Final = "does this picture show {caption}?"
# The sentence that the published models were trained with, by its SHA-256.
SYSTEM_SHA256: Final = "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"
SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Template:
    """The words around a conversation. ``system_sha256``, if given, must be that of ``system``."""

    system: str = ""
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    end: str = "</s>"
    system_sha256: str | None = None

    def __post_init__(self) -> None:
        found = hashlib.sha256(self.system.encode()).hexdigest()
        if self.system_sha256 is not None and found != self.system_sha256:
            raise ConfigError(
                f"the system sentence has SHA-256 {found[:12]}…, expected "
                f"{self.system_sha256[:12]}…; the model was trained with another one",
                field="system",
            )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says, with ``<image>`` where a picture is."""

    role: Literal["user", "assistant"]
    text: str


VICUNA_V1: Final = Template(system=SYSTEM, system_sha256=SYSTEM_SHA256)
SHORT: Final = Template()


def template_from(values: Mapping[str, Any] | None) -> Template:
    """A template from a configuration; without one, that of the published models."""
    return VICUNA_V1 if values is None else Template(**values)


def picture_prompt(prompt: str) -> list[Turn]:
    """The conversation that asks for a picture; an empty prompt is the unconditional one."""
    return [Turn(role="user", text=prompt.strip())]


def head_text(template: Template) -> str:
    """What every conversation begins with, up to the first word of the user."""
    return f"{template.system} {template.user}" if template.system else template.user


def conversation_text(template: Template, turns: Sequence[Turn]) -> str:
    """The whole prompt as text; after a last turn of the user it asks for the answer.

    Raises:
        InvalidRequest: the turns do not alternate, beginning with the user.
    """
    text = f"{template.system} " if template.system else ""
    for number, turn in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise InvalidRequest(
                f"message {number + 1} is from the {turn.role}, expected one from the {expected}; "
                "send turns of user and assistant, beginning with the user",
                field="messages",
            )
        text += _asked(template, turn) if number % 2 == 0 else _answered(template, turn)
    return f"{text}{template.assistant}" if len(turns) % 2 else text


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids with `IMAGE_PLACEHOLDER` at every ``<image>``.

    The pieces between pictures are tokenized on their own, and one BOS goes in front of all.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + _pieces(tokenizer, text)


def training_ids(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn]
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and their labels: what the assistant says, to its end.

    A prompt is tokenized as it will be in use, up to the name of the assistant, and the answer,
    which begins with a space, on its own.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORED] * len(ids)
    prompt = f"{template.system} " if template.system else ""
    for turn in turns:
        if turn.role == "user":
            prompt += f"{_asked(template, turn)}{template.assistant}"
            continue
        asked = _pieces(tokenizer, prompt)
        answered = _pieces(tokenizer, _answered(template, turn).removeprefix(template.assistant))
        ids += asked + answered
        labels += [IGNORED] * len(asked) + answered
        prompt = ""
    return ids, labels


def _asked(template: Template, turn: Turn) -> str:
    """A turn of the user; one that says nothing is only the name."""
    return f"{template.user} {turn.text} " if turn.text else template.user


def _answered(template: Template, turn: Turn) -> str:
    return f"{template.assistant} {turn.text}{template.end}"


def _pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            ids.append(IMAGE_PLACEHOLDER)
        ids += tokenizer.encode(piece, add_special_tokens=False) if piece else []
    return ids
