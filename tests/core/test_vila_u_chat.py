"""Answers and judgements of a VILA-U: greedy and drawn, alone and together, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.splice import Row, pad_rows
from gesso_core.models.vila_u.template import CAPTION_QUESTION
from gesso_core.models.vila_u.vision_tower import TowerCodes
from gesso_core.pipelines import vila_u_prompt
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerDraft, AnswerOptions, Part, Utterance, Video
from gesso_core.pipelines.vila_u_room import answering_bytes, judging_bytes

GREEDY = AnswerOptions(max_tokens=12)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3)).astype(np.uint8)


def said(*parts: Part, role: Any = "user") -> Utterance:
    return Utterance(role=role, parts=parts)


CONVERSATIONS = (
    [said(picture(0), "what is it?")],
    [said("hello there")],
    [said(picture(1), "what?"), said("a red disc", role="assistant"), said("describe it")],
    [said("Be brief.", role="system"), said(picture(2), picture(3), "which is red?")],
    [said(Video(np.stack([picture(n) for n in range(5)])), "what is it?")],
)
OPTIONS = (
    GREEDY,
    AnswerOptions(max_tokens=9, temperature=1.0, seed=3),
    AnswerOptions(max_tokens=6, temperature=0.7, top_p=0.8, seed=3),
    GREEDY,
    AnswerOptions(max_tokens=15, temperature=2.0, top_p=0.5, seed=8),
)


def answered(
    pipeline: VilaUPipeline,
    conversations: Sequence[Sequence[Utterance]],
    options: Sequence[AnswerOptions],
) -> list[AnswerDraft]:
    drafts = [pipeline.begin_answer(c, o) for c, o in zip(conversations, options, strict=True)]
    while going := [draft for draft in drafts if not draft.done]:
        moved = dict(zip(map(id, going), pipeline.advance_answers(going), strict=True))
        drafts = [moved.get(id(draft), draft) for draft in drafts]
    return drafts


def test_an_answer_is_the_same_alone_and_in_a_mixed_batch(vila_u: VilaUPipeline) -> None:
    together = answered(vila_u, CONVERSATIONS, OPTIONS)
    for conversation, options, draft in zip(CONVERSATIONS, OPTIONS, together, strict=True):
        (alone,) = answered(vila_u, [conversation], [options])
        assert (alone.ids, alone.text) == (draft.ids, draft.text)
        assert 0 < draft.answer_tokens <= options.max_tokens


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_greedy_answers_are_those_of_transformers(vila_u: VilaUPipeline, number: int) -> None:
    (draft,) = answered(vila_u, [CONVERSATIONS[number]], [GREEDY])
    row = vila_u.prompter.conversation(CONVERSATIONS[number])
    embeddings = vila_u.model.embed(pad_rows([row]))
    generated = vila_u.model.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=sorted(vila_u.chat.ends),
        pad_token_id=2,
    )
    assert list(draft.ids) == generated[0].tolist()
    assert draft.prompt_tokens == len(row)


def test_conversations_are_fed_together_and_those_that_write_wait_for_them(
    vila_u: VilaUPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [vila_u.begin_answer(c, o) for c, o in zip(CONVERSATIONS, OPTIONS, strict=True)]
    (first,) = vila_u.advance_answers(begun[:1])
    encode, seen = vila_u.model.tower.encode, list[int]()

    def noted(pixels_B3SS: torch.Tensor) -> TowerCodes:
        seen.append(len(pixels_B3SS))
        return encode(pixels_B3SS)

    monkeypatch.setattr(vila_u.model.tower, "encode", noted)
    waited, *fed = vila_u.advance_answers([first, *begun[1:]])
    assert waited is first
    assert seen == [1 + 2 + vila_u.model.config.video_frames]
    for before, draft in zip(begun[1:], fed, strict=True):
        (alone,) = vila_u.advance_answers([before])
        assert draft.stream is not None
        assert alone.stream is not None
        assert draft.ids == ()
        assert draft.stream.length == draft.prompt_tokens
        assert torch.equal(draft.stream.state_S, alone.stream.state_S)


def test_many_long_prompts_are_fed_in_portions(
    vila_u: VilaUPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = answered(vila_u, CONVERSATIONS, OPTIONS)
    monkeypatch.setattr(vila_u_prompt, "TOKENS_TOGETHER", 20)
    monkeypatch.setattr(vila_u_prompt, "PICTURES_TOGETHER", 2)
    portioned = answered(vila_u, CONVERSATIONS, OPTIONS)
    assert [draft.ids for draft in portioned] == [draft.ids for draft in together]


def test_what_was_shown_is_never_taken_back(vila_u: VilaUPipeline) -> None:
    options = AnswerOptions(max_tokens=40, temperature=1.5, seed=5, stop=("qqq",))
    draft = vila_u.begin_answer(CONVERSATIONS[1], options)
    seen = [draft.text]
    while not draft.done:
        (draft,) = vila_u.advance_answers([draft])
        seen.append(draft.text)
    assert len(seen) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))


def test_a_stop_text_ends_the_answer_before_it(vila_u: VilaUPipeline) -> None:
    options = AnswerOptions(max_tokens=30, temperature=1.0, seed=11)
    (whole,) = answered(vila_u, [CONVERSATIONS[1]], [options])
    stop = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = answered(vila_u, [CONVERSATIONS[1]], [replace(options, stop=("never", stop))])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.answer_tokens < whole.answer_tokens


def test_an_answer_ends_at_its_mark_or_at_its_length(
    vila_u: VilaUPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    (draft,) = answered(vila_u, [CONVERSATIONS[0]], [AnswerOptions(max_tokens=5)])
    assert (draft.finish_reason, draft.answer_tokens) == ("length", 5)
    monkeypatch.setattr(vila_u.chat, "ends", frozenset({draft.ids[2]}))
    (ended,) = answered(vila_u, [CONVERSATIONS[0]], [AnswerOptions(max_tokens=5)])
    assert ended.finish_reason == "stop"
    assert ended.ids == draft.ids[: draft.ids.index(draft.ids[2]) + 1]


def test_a_seed_decides_a_drawn_answer(vila_u: VilaUPipeline) -> None:
    options = AnswerOptions(max_tokens=10, temperature=1.5, seed=1)
    first, again, other = answered(
        vila_u, [CONVERSATIONS[1]] * 3, [options, options, replace(options, seed=2)]
    )
    assert first.ids == again.ids != other.ids


def test_memory_of_an_answer_is_known_before_it_is_taken(vila_u: VilaUPipeline) -> None:
    for conversation in CONVERSATIONS:
        (draft,) = vila_u.advance_answers([vila_u.begin_answer(conversation, GREEDY)])
        assert answering_bytes(vila_u, conversation, GREEDY) == vila_u.kv_bytes(draft)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_options_out_of_range_are_refused_by_field(
    vila_u: VilaUPipeline, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        vila_u.begin_answer(CONVERSATIONS[1], AnswerOptions(**options))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("conversation", "field", "words"),
    [
        ([said("hello", role="assistant")], "messages", "does not end with a message of the user"),
        ([said("a"), said("b")], "messages", "message 2 is from the user"),
        ([said("a"), said("b", role="assistant"), said("c", role="system")], "messages", "first"),
        ([said("<image> what?")], "messages", "mark of the model"),
        ([said(picture(0)[..., :2])], "image", "send RGB"),
        ([said(Video(picture(0)))], "video", "frames, height, width"),
        ([said("word " * 200)], "messages", "the model takes 128 together"),
    ],
)
def test_conversations_it_cannot_read_are_refused(
    vila_u: VilaUPipeline, conversation: list[Utterance], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        vila_u.begin_answer(conversation, GREEDY)
    assert caught.value.field == field


@pytest.mark.parametrize("way", ["answer", "caption"])
def test_the_judge_gives_each_picture_its_own_score(
    vila_u: VilaUPipeline, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vila_u.model, "config", replace(vila_u.model.config, judges_by=way))
    pictures = [picture(n) for n in range(5)]
    scores = vila_u.judge(pictures, "a red disc")
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) == 5
    assert [vila_u.judge([one], "a red disc")[0] for one in pictures] == scores
    assert vila_u.judge(pictures, "a red disc.") == scores
    assert vila_u.judge(pictures, "hello") != scores
    assert vila_u.judge([], "a red disc") == []
    assert judging_bytes(vila_u, 5, "a red disc") > judging_bytes(vila_u, 2, "a red disc")


def test_by_caption_the_score_is_the_mean_probability_of_its_tokens(
    vila_u: VilaUPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vila_u.model, "config", replace(vila_u.model.config, judges_by="caption"))
    ids = vila_u.chat.tokenizer.encode(" a red disc", add_special_tokens=False)
    asked = vila_u.prompter.conversation([said(picture(0), CAPTION_QUESTION)])
    told = vila_u.prompter.row(ids, [])
    whole = Row(
        ids_L=torch.cat([asked.ids_L, told.ids_L]),
        codes_LD=torch.cat([asked.codes_LD, told.codes_LD]),
        labels_LD=torch.cat([asked.labels_LD, told.labels_LD]),
    )
    logits = vila_u.model.text_logits(vila_u.model.states(pad_rows([whole])))[0]
    log = logits[-len(ids) - 1 : -1].double().log_softmax(dim=-1)
    mean = log.gather(1, torch.tensor(ids)[:, None]).mean().exp()
    assert vila_u.judge([picture(0)], "a red disc")[0] == pytest.approx(float(mean), rel=1e-4)


def test_the_judge_refuses_what_it_cannot_ask(vila_u: VilaUPipeline) -> None:
    for prompt, words in (("", "empty"), ("<image>", "mark"), ("word " * 200, "together")):
        with pytest.raises(InvalidRequest, match=words) as caught:
            vila_u.judge([picture(0)], prompt)
        assert caught.value.field == "prompt"
        with pytest.raises(InvalidRequest, match=words):
            vila_u.judging.question(prompt)  # without a picture


def test_a_prompt_for_the_judge_fits_up_to_the_last_token(vila_u: VilaUPipeline) -> None:
    context = vila_u.model.config.context
    fits = "red"
    while vila_u.judging.question(fits).tokens < context:
        fits += " red"
    assert len(vila_u.judge([picture(0)], fits)) == 1
    with pytest.raises(InvalidRequest, match=f"{context + 1} tokens together; .* takes {context}:"):
        vila_u.judging.question(f"{fits} red")
