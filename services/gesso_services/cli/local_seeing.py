"""``gesso ask --local`` and ``gesso judge --local``: a model that sees, in this process."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from gesso_core.pipelines.pictures import decode_picture
from gesso_core.pipelines.videos import decode_video
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerDraft, AnswerOptions, Part, Utterance, Video

from gesso_services.cli.common import name_or_folder
from gesso_services.client import Answer
from gesso_services.client_talk import is_video
from gesso_services.gateway.orders import RANDOM_SEEDS

DEFAULT_MODEL = "vilau-tiny"


def load_seeing(name: str | None) -> VilaUPipeline:
    """The model of that name, or in that folder."""
    from gesso_core.pipelines.vila_u_load import load_vila_u

    return load_vila_u(name_or_folder(name or DEFAULT_MODEL))


def ask_here(
    question: str, shown: Sequence[bytes], options: dict[str, Any], on_text: Callable[[str], None]
) -> Answer:
    """The answer that a server would have given."""
    pipeline = load_seeing(options["model"])
    wish = {name: options[name] for name in ("max_tokens", "temperature", "seed")}
    if wish["seed"] is None:
        wish["seed"] = secrets.randbelow(RANDOM_SEEDS)
    given = {name: value for name, value in wish.items() if value is not None}
    parts = (*(_part(data, pipeline) for data in shown), question)
    draft = pipeline.begin_answer([Utterance(role="user", parts=parts)], AnswerOptions(**given))
    said = ""
    while not draft.done:
        (draft,) = pipeline.advance_answers([draft])
        on_text(draft.text[len(said) :])
        said = draft.text
    return _answer(draft, pipeline)


def judge_here(prompt: str, pictures: Sequence[bytes], model: str | None) -> list[float]:
    """The scores that a server would have given."""
    return load_seeing(model).judge([decode_picture(data) for data in pictures], prompt)


def _part(data: bytes, pipeline: VilaUPipeline) -> Part:
    if not is_video(data):
        return decode_picture(data)
    return Video(decode_video(data, max(1, pipeline.model.config.video_frames)))


def _answer(draft: AnswerDraft, pipeline: VilaUPipeline) -> Answer:
    assert draft.finish_reason is not None
    return Answer(
        text=draft.text,
        finish_reason=draft.finish_reason,
        model=pipeline.entry.name,
        prompt_tokens=draft.prompt_tokens,
        answer_tokens=draft.answer_tokens,
    )
