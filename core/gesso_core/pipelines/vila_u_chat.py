"""Answers about pictures and videos, and answers without any: a few tokens per step.

Conversations of any lengths share the forward of the language model; each draws with its own
numbers. A start marker of a picture ends an answer like the end mark does: chat is for words.
"""

# B drafts   S width of the states   V vocabulary   M tokens of an answer

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Generator, Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.code_sampling import inverse_cdf, top_p_filter
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.rows import padded_rows
from gesso_core.pipelines.vila_u_draft import (
    AnswerDraft,
    AnswerOptions,
    FinishReason,
    Stream,
    Utterance,
    all_finite,
)
from gesso_core.pipelines.vila_u_prompt import Prompter

TOKENS_PER_STEP: Final = 4
MAX_TEMPERATURE: Final = 2.0
HALF_A_CHARACTER: Final = "\ufffd"


class Chat:
    """Begins answers and advances them."""

    def __init__(self, model: VilaU, tokenizer: Any, prompter: Prompter) -> None:
        self.model, self.tokenizer, self.prompter = model, tokenizer, prompter
        config = model.config
        ends = {tokenizer.eos_token_id, config.im_start, config.vi_start}
        self.ends = frozenset(token for token in ends if token is not None)

    def begin(self, conversation: Sequence[Utterance], options: AnswerOptions) -> AnswerDraft:
        """Read a conversation, and draw all random numbers; the first step feeds the conversation.

        Raises:
            InvalidRequest: an option out of range, or a conversation that the model cannot read.
        """
        _check(options)
        config = self.model.config
        prompt = self.prompter.prompt(conversation)
        prompt_tokens = len(prompt.ids) + len(prompt.signals) * (config.tokens - 1)
        self.prompter.check_length(prompt_tokens, options.max_tokens, "messages")
        generator = Generator().manual_seed(options.seed)
        return AnswerDraft(
            options=options,
            prompt=prompt,
            uniforms_M=torch.rand(options.max_tokens, generator=generator, dtype=torch.float64),
            prompt_tokens=prompt_tokens,
            pixels=config.tower.image_size**2,
        )

    @torch.inference_mode()
    def advance(self, drafts: Sequence[AnswerDraft]) -> list[AnswerDraft]:
        """A few tokens of every answer; one that ends leaves the others to go on.

        Where conversations are still to be fed, a step feeds them all, and the others wait for it:
        so those that came one after another are answered together.
        """
        unfed = [b for b, draft in enumerate(drafts) if draft.prompt is not None]
        if not unfed:
            return self._write(drafts)
        fed = dict(zip(unfed, self._fed([drafts[b] for b in unfed]), strict=True))
        return [fed.get(b, draft) for b, draft in enumerate(drafts)]

    def _fed(self, drafts: Sequence[AnswerDraft]) -> list[AnswerDraft]:
        """Drafts with their conversations behind them."""
        rows = self.prompter.rows([draft.prompt for draft in drafts if draft.prompt is not None])
        streams = self.prompter.fill(
            [
                self.prompter.begun(row, draft.options.max_tokens)
                for row, draft in zip(rows, drafts, strict=True)
            ]
        )
        return [
            replace(draft, prompt=None, stream=stream, finite=all_finite([stream.state_S]))
            for draft, stream in zip(drafts, streams, strict=True)
        ]

    def _write(self, drafts: Sequence[AnswerDraft]) -> list[AnswerDraft]:
        going = list(range(len(drafts)))
        written = [list(draft.ids) for draft in drafts]
        streams = [draft.stream for draft in drafts if draft.stream is not None]
        assert len(streams) == len(drafts)
        reasons: list[FinishReason | None] = [draft.finish_reason for draft in drafts]
        for _ in range(TOKENS_PER_STEP):
            going = [b for b in going if reasons[b] is None]
            if not going:
                break
            states_BS = torch.stack([streams[b].state_S for b in going])
            logits_BV = self._logits(states_BS)
            ids = self._chosen(logits_BV, [drafts[b] for b in going], [written[b] for b in going])
            for b, token in zip(going, ids, strict=True):
                written[b].append(token)
                reasons[b] = self._reason(drafts[b].options, written[b])
            self._feed(streams, [b for b in going if reasons[b] is None], written)
        # Once a state is not finite, all behind it are not.
        finite = torch.stack([stream.state_S for stream in streams]).isfinite().all(dim=1).tolist()
        return [
            self._moved(draft, streams[b], written[b], reasons[b], finite[b])
            for b, draft in enumerate(drafts)
        ]

    def _logits(self, states_BS: Tensor) -> Tensor:
        return self.model.text_logits(padded_rows(states_BS))[: len(states_BS)].float()

    def _chosen(
        self, logits_BV: Tensor, drafts: Sequence[AnswerDraft], written: Sequence[list[int]]
    ) -> list[int]:
        likeliest: list[int] = logits_BV.argmax(dim=-1).tolist()
        drawing = [b for b, draft in enumerate(drafts) if draft.options.temperature > 0]
        if drawing:
            options = [drafts[b].options for b in drawing]
            device = logits_BV.device
            temperature_B1 = torch.tensor([[o.temperature] for o in options], device=device)
            top_p_B = torch.tensor([o.top_p for o in options], device=device)
            uniform_B = torch.stack([drafts[b].uniforms_M[len(written[b])] for b in drawing])
            probabilities_BV = (logits_BV[drawing] / temperature_B1).softmax(dim=-1)
            drawn = inverse_cdf(top_p_filter(probabilities_BV, top_p_B), uniform_B).tolist()
            for b, token in zip(drawing, drawn, strict=True):
                likeliest[b] = token
        return likeliest

    def _feed(self, streams: list[Stream], going: list[int], written: list[list[int]]) -> None:
        if not going:
            return
        tokens = torch.tensor([[written[b][-1]] for b in going], device=self.model.device)
        states_B1S = self.model.rows(
            self.model.embed_text(tokens),
            [streams[b].cache for b in going],
            [streams[b].length for b in going],
        )
        for b, state_S in zip(going, states_B1S[:, 0], strict=True):
            streams[b] = Stream(streams[b].cache, streams[b].length + 1, state_S)

    def _reason(self, options: AnswerOptions, ids: list[int]) -> FinishReason | None:
        if ids[-1] in self.ends:
            return "stop"
        if options.stop and any(stop in self._text(ids) for stop in options.stop):
            return "stop"
        return "length" if len(ids) == options.max_tokens else None

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.lstrip()

    def _moved(
        self,
        draft: AnswerDraft,
        stream: Stream,
        ids: list[int],
        reason: FinishReason | None,
        finite: bool,
    ) -> AnswerDraft:
        text = self._text(ids)
        found = [text.find(stop) for stop in draft.options.stop if stop in text]
        if found:
            text = text[: min(found)]
        elif reason is None:
            text = _shown(text, draft.options.stop)
        return replace(
            draft, stream=stream, ids=tuple(ids), text=text, finish_reason=reason, finite=finite
        )


def _shown(text: str, stops: Sequence[str]) -> str:
    """What of an unfinished text will not be taken back: no half character, no half stop."""
    text = text.rstrip(HALF_A_CHARACTER)
    held = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - held]


def _check(options: AnswerOptions) -> None:
    if options.max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens {options.max_tokens}; ask for at least 1", field="max_tokens"
        )
    if not 0 <= options.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature {options.temperature}; allowed are 0 to {MAX_TEMPERATURE:g}, where 0 "
            "takes the likeliest word",
            field="temperature",
        )
    if not 0 < options.top_p <= 1:
        raise InvalidRequest(
            f"top_p {options.top_p}; allowed are numbers over 0 up to 1", field="top_p"
        )
    if not 0 <= options.seed < 2**63:
        raise InvalidRequest(f"seed {options.seed} is not in 0..2^63-1", field="seed")
    if not all(options.stop):
        raise InvalidRequest("an empty stop text would end every answer at once", field="stop")
