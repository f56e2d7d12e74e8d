"""What a text encoder gives: states per token, a mask, and whether anything was cut off."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest

# B prompts   L token positions   C channels


@dataclass(frozen=True)
class TextStates:
    """Encoded prompts.

    ``states_BLC``: one vector per token position; ``mask_BL``: bool, true at real tokens;
    ``truncated``: per prompt, whether it was longer than the encoder reads.
    """

    states_BLC: Tensor
    mask_BL: Tensor
    truncated: list[bool]

    def __len__(self) -> int:
        return self.states_BLC.shape[0]

    def pooled(self) -> Tensor:
        """Mean over the real tokens of each prompt, (B, C) float32."""
        weight_BL1 = self.mask_BL.to(torch.float32)[..., None]
        total_BC = (self.states_BLC.float() * weight_BL1).sum(1)
        return total_BC / weight_BL1.sum(1).clamp_min(1.0)

    @property
    def nbytes(self) -> int:
        """Bytes of states and mask."""
        return self.states_BLC.nbytes + self.mask_BL.nbytes

    def split(self) -> list["TextStates"]:
        """One `TextStates` of batch 1 per prompt; nothing is shared with the batch."""
        rows = zip(self.states_BLC, self.mask_BL, self.truncated, strict=True)
        return [
            TextStates(states_LC[None].clone(), mask_L[None].clone(), [cut])
            for states_LC, mask_L, cut in rows
        ]

    @staticmethod
    def concatenate(parts: Sequence["TextStates"]) -> "TextStates":
        """Stack along the batch; all parts have the same L and C."""
        return TextStates(
            torch.cat([part.states_BLC for part in parts]),
            torch.cat([part.mask_BL for part in parts]),
            [cut for part in parts for cut in part.truncated],
        )


def require_unicode(prompts: Sequence[str]) -> None:
    """Refuse half characters (lone surrogates), which no tokenizer can read."""
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt has half a character at position {error.start}; send valid Unicode",
                field="prompt",
            ) from error


class TextEncoder(Protocol):
    """Prompts to states. Pure, and batch-invariant: neighbors do not change a prompt's states.

    A pipeline that guides asks for the empty or negative prompt through ``encode_negative``,
    because some encoders prefix only positive prompts with an instruction.
    """

    @property
    def width(self) -> int:
        """Channels C of a state."""
        ...

    @property
    def max_tokens(self) -> int:
        """Token positions L of every result."""
        ...

    @property
    def instruction_hash(self) -> str:
        """Identifies the text in front of positive prompts; empty where there is none."""
        ...

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of positive prompts."""
        ...

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        """States of negative or empty prompts."""
        ...
