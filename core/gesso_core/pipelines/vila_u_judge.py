"""How well pictures show what a prompt asks for: the probability that the model says yes."""

# B pictures   L tokens of a question   S width of the states   V vocabulary

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.rows import padded_rows
from gesso_core.models.vila_u.template import (
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


class Judge:
    """Scores pictures; called with pictures and one prompt."""

    def __init__(self, model: VilaU, tokenizer: Any, prompter: Prompter) -> None:
        self.model, self.tokenizer, self.prompter = model, tokenizer, prompter
        self.yes, self.no = (_first_tokens(tokenizer, word) for word in ("yes", "no"))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Pixels], prompt: str) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for every picture, in their order.

        Raises:
            InvalidRequest: no prompt, one over the context, or a picture that is none.
        """
        caption = prompt.strip().rstrip(".?!")
        if not caption:
            raise InvalidRequest("the prompt is empty; say what was asked for", field="prompt")
        self.prompter.check_words(caption, "prompt")
        text = f"{PLACEHOLDER}\n{JUDGE_QUESTION.format(caption=caption)}"
        asked = conversation_text(self.prompter.template, [Turn(role="user", text=text)])
        ids = tokenize(self.tokenizer, asked)
        self.prompter.check_length(len(ids) - 1 + self.model.config.tokens, 0, "prompt")
        scores: list[float] = []
        for start in range(0, len(pictures), BATCH):
            coded = self.prompter.encode(pictures[start : start + BATCH])
            with explained("these pictures", "send fewer at once"):
                rows = [self.prompter.row(ids, [picture]) for picture in coded]
                states = [stream.state_S for stream in self.prompter.fill_all(rows, 0)]
                scores += self._scores(torch.stack(states))
        return scores

    def _scores(self, states_BS: Tensor) -> list[float]:
        logits_BV = self.model.text_logits(padded_rows(states_BS))[: len(states_BS)]
        probabilities_BV = logits_BV.double().softmax(dim=-1)
        yes_B = probabilities_BV[:, self.yes].sum(dim=1)
        no_B = probabilities_BV[:, self.no].sum(dim=1)
        scores: list[float] = (yes_B / (yes_B + no_B).clamp(min=1e-30)).tolist()
        return scores


def _first_tokens(tokenizer: Any, word: str) -> list[int]:
    """Tokens that say the word on their own, in whichever way it is written."""
    ways = [f"{space}{form}" for space in ("", " ") for form in (word, word.capitalize())]
    found = [tokenizer.encode(way, add_special_tokens=False) for way in ways]
    single = {ids[0] for ids in found if len(ids) == 1}
    return sorted(single or {ids[0] for ids in found})
