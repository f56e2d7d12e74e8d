"""Qwen2 as HART's text encoder (arXiv 2410.10812, section 3.3), through transformers.

Every prompt becomes exactly 300 ids, padded at the side that its tokenizer says. An instruction may
stand before it, whose ids are put in front unpadded and whose positions are dropped afterwards.
Features are the last hidden states after the final norm, in float32, at all 300 positions:
the published transformer reads those of the padding as well.

The published models were trained with an instruction whose wording is not part of this package.
Put it, as a text file named ``instruction.txt``, into the folder of the text encoder, or give
another file; without one prompts go in alone, and pictures are somewhat worse than published.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.text.from_folder import load_model, load_tokenizer, read_instruction
from gesso_core.text.states import TextStates, require_unicode

# B prompts   L token positions kept   T positions with the instruction   C channels

MAX_TOKENS: Final = 300
INSTRUCTION_FILE: Final = "instruction.txt"
PUBLISHED_INSTRUCTION: Final = "424f7aa7b1119f8ed1e329140e5941dfe308183bea0af59041dad5527a9b8f20"
_LOG = logging.getLogger(__name__)


class Qwen2Encoder:
    """Prompts to the states described at the top of this file."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        instruction: str = "",
        max_tokens: int = MAX_TOKENS,
        padding_side: str | None = None,
    ) -> None:
        """Wrap a ``transformers.Qwen2Model`` and its tokenizer.

        Args:
            model: the decoder stack.
            tokenizer: of the same folder.
            instruction: the text before prompts; empty for none.
            max_tokens: L.
            padding_side: ``"left"`` or ``"right"``; by default the tokenizer's own.

        Raises:
            WeightsError: a tokenizer without padding token, an instruction over ``max_tokens``.
        """
        if tokenizer.pad_token_id is None:
            raise WeightsError("this tokenizer has no padding token; use the one of the release")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.instruction = tokenizer, instruction
        self.max_tokens = max_tokens
        self.padding_side = padding_side or tokenizer.padding_side
        self._prefix = self.token_ids([instruction])[0] if instruction else []
        if len(self._prefix) > max_tokens:
            raise WeightsError(
                f"the instruction has {len(self._prefix)} tokens; at most {max_tokens} fit",
                field="instruction",
            )

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        instruction_file: Path | None = None,
        max_tokens: int = MAX_TOKENS,
        padding_side: str | None = None,
    ) -> "Qwen2Encoder":
        """Load model and tokenizer of one folder.

        ``instruction_file``: by default ``instruction.txt`` in the folder, where there is one.

        Raises:
            WeightsError: a missing file, or weights that do not fill the model.
        """
        from transformers import Qwen2Model

        model = load_model(
            Qwen2Model,
            folder,
            dtype,
            expected="a folder with config.json, safetensors and the tokenizer's files",
            without_head=True,
        )
        return cls(
            model.to(device),
            load_tokenizer(folder),
            instruction=_instruction(folder, instruction_file),
            max_tokens=max_tokens,
            padding_side=padding_side,
        )

    @property
    def width(self) -> int:
        """Channels of a state."""
        return int(self.model.config.hidden_size)

    @property
    def instruction_hash(self) -> str:
        """The sha256 of the instruction; empty without one."""
        return hashlib.sha256(self.instruction.encode()).hexdigest() if self.instruction else ""

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, uncut."""
        require_unicode(prompts)
        return [list(self.tokenizer(p, truncation=False)["input_ids"]) for p in prompts]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States (B, L, C) of prompts behind the instruction, float32, at padding as well."""
        return self._encode(prompts, self._prefix)

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        """The same without instruction."""
        return self._encode(prompts, [])

    def _encode(self, prompts: Sequence[str], prefix: list[int]) -> TextStates:
        # One prompt at a time, so that its states cannot depend on its neighbors.
        ids = self.token_ids(prompts)
        parts = [
            encode_ids(
                self.model,
                row,
                prefix,
                length=self.max_tokens,
                pad_id=int(self.tokenizer.pad_token_id),
                left=self.padding_side == "left",
            )
            for row in ids
        ]
        return TextStates.concatenate(parts)


@torch.no_grad()
def encode_ids(
    model: Any, ids: Sequence[int], prefix: Sequence[int], *, length: int, pad_id: int, left: bool
) -> TextStates:
    """States (1, L, C) of one prompt's ids.

    Args:
        model: a ``Qwen2Model``.
        ids: of the prompt; what is beyond ``length`` is cut off.
        prefix: ids in front, whose states are dropped.
        length: L.
        pad_id: what fills the prompt up; an id of the prompt that equals it counts as padding.
        left: pad in front of the prompt instead of behind it.
    """
    padded = padded_ids(ids, length, pad_id, left=left)
    ids_1T = torch.tensor([[*prefix, *padded]], device=model.device)
    real_L = ids_1T[0, len(prefix) :] != pad_id
    real_T = torch.cat([torch.ones(len(prefix), dtype=torch.bool, device=model.device), real_L])
    states_1TC = model(
        ids_1T, attention_mask=_causal_bias(real_T, model.dtype), use_cache=False
    ).last_hidden_state
    states_1LC = states_1TC[:, len(prefix) :].float()
    return TextStates(states_1LC, real_L[None], [len(ids) > length])


def padded_ids(ids: Sequence[int], length: int, pad_id: int, *, left: bool) -> list[int]:
    """Exactly ``length`` ids."""
    kept = list(ids[:length])
    padding = [pad_id] * (length - len(kept))
    return padding + kept if left else kept + padding


def _causal_bias(real_T: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T) to be added to the scores.

    A position without any real one before it looks at all positions alike, as in the library that
    the models were trained with; its states are read, so this matters.
    """
    seen_TT = torch.ones(len(real_T), len(real_T), dtype=torch.bool, device=real_T.device).tril()
    bias_TT = torch.zeros(seen_TT.shape, dtype=dtype, device=real_T.device)
    return bias_TT.masked_fill(~(seen_TT & real_T), torch.finfo(dtype).min)[None, None]


def _instruction(folder: Path, file: Path | None) -> str:
    """The instruction of a file, or of the folder; empty, and said so, without either."""
    if file is None:
        file = folder / INSTRUCTION_FILE
        if not file.is_file():
            _LOG.warning(
                "prompts are read without the instruction that HART was trained with; write it "
                "into %s, or give its file",
                file,
            )
            return ""
    text = read_instruction(file)
    if hashlib.sha256(text.encode()).hexdigest() != PUBLISHED_INSTRUCTION:
        _LOG.warning("the instruction in %s is not the published one; pictures may differ", file)
    return text
