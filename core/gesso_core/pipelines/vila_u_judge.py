"""How well pictures show what a prompt asks for, as a number from 0 to 1.

A model made for it is asked, and the score is the probability that it says yes. A small model names
what it sees more surely than it compares; then the score is how likely it would describe the
picture with the words of the prompt: the geometric mean of their probabilities. The configuration
says which (`VilaUConfig.judges_by`). Scores of one prompt can be compared, those of two prompts
only where the model is asked.
"""

# B pictures   L tokens of a question   S width of the states   V vocabulary   M words of a caption

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.rows import padded_rows
from gesso_core.models.vila_u.template import (
    CAPTION_QUESTION,
    JUDGE_QUESTION,
    PLACEHOLDER,
    Turn,
    conversation_text,
    tokenize,
)
from gesso_core.pipelines.memory import explained
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.vila_u_prompt import Prompter

BATCH: Final = 32


class Question(NamedTuple):
    """What the model reads: the question, how many tokens at its end are the caption, and how many
    there are in all once the picture stands in its place.
    """

    ids: list[int]
    caption_tokens: int
    tokens: int


class Judge:
    """Scores pictures; called with pictures and one prompt."""

    def __init__(self, model: VilaU, tokenizer: Any, prompter: Prompter) -> None:
        self.model, self.tokenizer, self.prompter = model, tokenizer, prompter
        self.yes, self.no = (_first_tokens(tokenizer, word) for word in ("yes", "no"))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Pixels], prompt: str) -> list[float]:
        """A score for every picture, in their order.

        Raises:
            InvalidRequest: no prompt, one over the context, or a picture that is none.
        """
        question = self.question(prompt)
        scores: list[float] = []
        for start in range(0, len(pictures), BATCH):
            coded = self.prompter.encode(pictures[start : start + BATCH])
            with explained("these pictures", "send fewer at once"):
                rows = [self.prompter.row(question.ids, [picture]) for picture in coded]
                fed = self.prompter.feed([self.prompter.begun(row, 0) for row in rows])
                states_BLS = torch.stack(fed)  # of one length, as the question is the same
                if question.caption_tokens:
                    scores += self._likelihood(states_BLS, question)
                else:
                    scores += self._assent(states_BLS[:, -1])
        return scores

    def question(self, prompt: str) -> Question:
        """The tokens about each picture, whose place is one of them.

        Raises:
            InvalidRequest: no prompt, one with a mark of the model, or one over the context.
        """
        caption = prompt.strip().rstrip(".?!")
        if not caption:
            raise InvalidRequest("the prompt is empty; say what was asked for", field="prompt")
        self.prompter.check_words(caption, "prompt")
        by_caption = self.model.config.judges_by == "caption"
        asked = CAPTION_QUESTION if by_caption else JUDGE_QUESTION.format(caption=caption)
        turn = Turn(role="user", text=f"{PLACEHOLDER}\n{asked}")
        ids = tokenize(self.tokenizer, conversation_text(self.prompter.template, [turn]))
        said: list[int] = []
        if by_caption:
            said = self.tokenizer.encode(f" {caption}", add_special_tokens=False)
        tokens = len(ids) + len(said) - 1 + self.model.config.tokens
        self._check_length(tokens)
        return Question(ids + said, len(said), tokens)

    def _check_length(self, tokens: int) -> None:
        context = self.model.config.context
        if tokens > context:
            raise InvalidRequest(
                f"the prompt, a picture and the question about it have {tokens} tokens together; "
                f"the model that judges takes {context}: shorten the prompt by at least "
                f"{tokens - context} tokens",
                field="prompt",
            )

    def _assent(self, states_BS: Tensor) -> list[float]:
        """P(yes) / (P(yes) + P(no))."""
        probabilities_BV = self._log_probabilities(states_BS).exp()
        yes_B = probabilities_BV[:, self.yes].sum(dim=1)
        no_B = probabilities_BV[:, self.no].sum(dim=1)
        scores: list[float] = (yes_B / (yes_B + no_B).clamp(min=1e-30)).tolist()
        return scores

    def _likelihood(self, states_BLS: Tensor, question: Question) -> list[float]:
        """The geometric mean of P(token of the caption | picture, tokens before)."""
        count = question.caption_tokens
        said_M = torch.tensor(question.ids[-count:], device=states_BLS.device)
        before_BMS = states_BLS[:, -count - 1 : -1]
        log_NV = self._log_probabilities(before_BMS.flatten(0, 1))
        log_BM = log_NV.gather(1, said_M.repeat(len(states_BLS))[:, None]).view(-1, count)
        scores: list[float] = log_BM.mean(dim=1).exp().tolist()
        return scores

    def _log_probabilities(self, states_NS: Tensor) -> Tensor:
        logits_NV = self.model.text_logits(padded_rows(states_NS))[: len(states_NS)]
        return logits_NV.double().log_softmax(dim=-1)


def _first_tokens(tokenizer: Any, word: str) -> list[int]:
    """Tokens that say the word on their own, in whichever way it is written."""
    ways = [f"{space}{form}" for space in ("", " ") for form in (word, word.capitalize())]
    found = [tokenizer.encode(way, add_special_tokens=False) for way in ways]
    single = {ids[0] for ids in found if len(ids) == 1}
    return sorted(single or {ids[0] for ids in found})
