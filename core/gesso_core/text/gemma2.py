"""Gemma-2 as Sana's text encoder (arXiv 2410.10629, section 3.2), through transformers.

The decoder stack with its final norm, last hidden states, causal mask, right padding. A *complex
human instruction* stands before a positive prompt, so that its states become richer; nothing is
generated. The published models were trained with the published wording: for exact parity give that
text as a file. The wording below is our own, with the same structure.

Length: with ``n`` instruction tokens (counting bos), instruction and prompt are padded or cut to
``T = n + L - 2`` tokens, of which bos and the last ``L - 1`` are kept: the prompt in the context of
the instruction. The 2 stands for bos and for the blank that ends the instruction, which merges
into the prompt's first token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.text.from_folder import load_model, load_tokenizer, read_instruction
from gesso_core.text.states import TextStates, require_unicode

# B prompts   T tokens with the instruction   L tokens kept   C channels

MAX_TOKENS: Final = 300
INSTRUCTION: Final = "\n".join(
    (
        "You rewrite short picture requests as rich descriptions of what the picture shows. Look "
        "first at how much the request already says.",
        "- When it says little, add what a viewer would see: which colors and shapes, how large, "
        "what surfaces feel like, and where things stand in relation to each other.",
        "- When it already says much, keep all of it and only polish the wording.",
        "Two rewritten requests to learn from:",
        "- Request: a fox in the snow => Description: a rust-red fox with a thick, white-tipped "
        "tail wades through knee-deep powder snow, its breath visible in the cold air, in front "
        "of dark pines that fade into fog.",
        "- Request: a market street => Description: a narrow cobbled street between wooden stalls "
        "under striped awnings, heaped with oranges, herbs and bread, with people in light summer "
        "clothes strolling past in the low evening sun.",
        "Write the description that belongs to the last request, and write nothing else.",
        "Request: ",
    )
)
FLOAT16_REFUSED: Final = (
    "Gemma-2 overflows float16 and then gives NaN states; load the text encoder in bfloat16 or "
    "float32 (the denoiser may stay in float16)"
)


class Gemma2Encoder:
    """Prompts to the last hidden states of Gemma-2, (B, L, C), in the model's dtype."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        instruction: str = INSTRUCTION,
        max_tokens: int = MAX_TOKENS,
        lower_case: bool = False,
    ) -> None:
        """Wrap a ``transformers.Gemma2Model`` and its tokenizer.

        Args:
            model: the decoder stack, in bfloat16 or float32.
            tokenizer: prepends bos, appends nothing.
            instruction: the text before positive prompts; empty for none.
            max_tokens: L.
            lower_case: lower-case prompts, as diffusers does. Off, because it harms prompts that
                ask for written words.

        Raises:
            WeightsError: a float16 model.
        """
        if model.dtype == torch.float16:
            raise WeightsError(FLOAT16_REFUSED, field="dtype")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.max_tokens = max_tokens
        self.lower_case = lower_case

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        instruction: str = INSTRUCTION,
        instruction_file: Path | None = None,
        lower_case: bool = False,
    ) -> "Gemma2Encoder":
        """Load ``text_encoder`` and ``tokenizer`` of a diffusers pipeline folder.

        ``instruction_file`` is a text file that replaces ``instruction``, read as it is.

        Raises:
            WeightsError: float16, a missing file, or weights that do not fill the model.
        """
        from transformers import Gemma2Model

        if dtype == torch.float16:
            raise WeightsError(FLOAT16_REFUSED, field="dtype")
        if instruction_file is not None:
            instruction = read_instruction(instruction_file)
        model = load_model(
            Gemma2Model,
            folder / "text_encoder",
            dtype,
            expected="the text_encoder folder of a Sana pipeline in the diffusers layout",
        )
        tokenizer = load_tokenizer(folder / "tokenizer")
        return cls(model.to(device), tokenizer, instruction=instruction, lower_case=lower_case)

    @property
    def width(self) -> int:
        """Channels of a state."""
        return int(self.model.config.hidden_size)

    @property
    def instruction_hash(self) -> str:
        """The sha256 of the instruction; empty without one."""
        return hashlib.sha256(self.instruction.encode()).hexdigest() if self.instruction else ""

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of positive prompts, which follow the instruction; padded positions are zero."""
        return self._encode(prompts, self.instruction)

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        """States of negative or empty prompts, without instruction."""
        return self._encode(prompts, "")

    def _encode(self, prompts: Sequence[str], instruction: str) -> TextStates:
        require_unicode(prompts)
        total = self.max_tokens
        if instruction:
            total += len(self._token_ids(instruction)) - 2
        # One prompt at a time, so that its states cannot depend on its neighbors.
        parts = [self._encode_one(instruction + self._cleaned(p), total) for p in prompts]
        return TextStates.concatenate(parts)

    @torch.no_grad()
    def _encode_one(self, text: str, total: int) -> TextStates:
        ids = self._token_ids(text)
        used_BT = torch.tensor([ids[:total]], device=self.model.device)
        # Behind a causal mask padding is never seen, so it is added afterwards.
        states_BTC = self.model(used_BT, use_cache=False).last_hidden_state
        padding = total - used_BT.shape[1]
        states_BTC = torch.nn.functional.pad(states_BTC, (0, 0, 0, padding))
        mask_BT = torch.nn.functional.pad(torch.ones_like(used_BT, dtype=torch.bool), (0, padding))
        states_BLC, mask_BL = kept_window(states_BTC, mask_BT, self.max_tokens)
        return TextStates(states_BLC, mask_BL, [len(ids) > total])

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=True)["input_ids"])

    def _cleaned(self, prompt: str) -> str:
        return prompt.lower().strip() if self.lower_case else prompt.strip()


def kept_window(states_BTC: Tensor, mask_BT: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Position 0 and the last ``length - 1`` of both; everything where T equals ``length``."""
    kept = torch.tensor([0, *range(mask_BT.shape[1] - length + 1, mask_BT.shape[1])])
    kept = kept.to(mask_BT.device)
    return states_BTC[:, kept], mask_BT[:, kept]
