"""SmolLM2's first layers as a text encoder (`smollm2-l6`): a decoder-only LLM read half-way.

Matrices are stored as Q4_1 / Q8_0 blocks (`quantized_blocks`); the layers are dequantized once, of
the token table only the rows that a prompt needs.

Feature recipe: no template and no beginning-of-sequence token; right padding to 20 tokens; causal
mask; the residual stream after the last kept layer *without* a final norm; every token divided by
its own RMS, which removes the massive activation of the first token; then, if the denoiser
brings statistics of its captions, ``(h - mean) / std`` per channel. The empty caption is one
end-of-text token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.safe_files import read_tensors
from gesso_core.text.quantized_blocks import dequantize
from gesso_core.text.smollm2_model import SmolLM2, SmolLM2Config
from gesso_core.text.states import TextStates, require_unicode

# B prompts   L token positions   V vocabulary   S stored bytes of a row   D width


class SmolLM2Encoder:
    """Prompts to the states described at the top of this file."""

    def __init__(
        self,
        model: SmolLM2,
        embedding_rows_VS: Tensor,
        tokenizer: Tokenizer,
        text_stats: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.config = model.config
        self.model = model.eval().requires_grad_(False)
        self.embedding_rows_VS = embedding_rows_VS
        self.tokenizer = tokenizer
        # A prompt that spells a special token is text, never a control token.
        self.tokenizer.encode_special_tokens = True
        self.text_stats = text_stats

    @classmethod
    def from_folder(cls, folder: Path, text_stats: Path | None = None) -> "SmolLM2Encoder":
        """Load ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

        ``text_stats``: a safetensors file with ``mean`` and ``std`` (D,), which a denoiser keeps
        next to its weights.
        """
        config = SmolLM2Config.from_file(folder / "config.json")
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise WeightsError(f"{tokenizer_file} is missing; download 'smollm2-l6' again")
        stored = read_tensors(folder / "model.safetensors")
        rows_VS = stored.pop("embed_tokens.weight")
        stored.pop("original_token_ids", None)
        with torch.device("meta"):
            model = SmolLM2(config)
        model.load_state_dict(_dequantized(stored, config), strict=True, assign=True)
        stats = read_text_stats(text_stats, config.hidden_size) if text_stats else None
        return cls(model, rows_VS, Tokenizer.from_file(str(tokenizer_file)), stats)

    @property
    def width(self) -> int:
        """Channels of a state."""
        return self.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """Token positions of every result."""
        return self.config.max_tokens

    @property
    def instruction_hash(self) -> str:
        """Empty: this encoder has no instruction."""
        return ""

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, uncut; the empty prompt is one end-of-text token."""
        require_unicode(prompts)
        encodings = self.tokenizer.encode_batch(list(prompts), add_special_tokens=False)
        return [encoding.ids or [self.config.end_of_text_id] for encoding in encodings]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States (B, 20, 576) float32; padded positions are zero."""
        ids, length = self.token_ids(prompts), self.max_tokens
        longest = min(length, max(len(row) for row in ids))  # causal: padding changes nothing
        padded = [(row + [self.config.pad_id] * longest)[:longest] for row in ids]
        mask_BL = torch.tensor([[i < len(row) for i in range(length)] for row in ids])
        states_BLD = nn.functional.pad(
            self._states(torch.tensor(padded)), (0, 0, 0, length - longest)
        )
        states_BLD = states_BLD * mask_BL[..., None]
        return TextStates(states_BLD, mask_BL, [len(row) > length for row in ids])

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        """The same as `encode`: this encoder has no instruction."""
        return self.encode(prompts)

    @torch.no_grad()
    def _states(self, ids_BL: Tensor) -> Tensor:
        embeddings_BLD = dequantize(self.config.embedding_format, self.embedding_rows_VS[ids_BL])
        hidden_BLD: Tensor = self.model(embeddings_BLD)
        hidden_BLD = hidden_BLD * hidden_BLD.square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        if self.text_stats is not None:
            mean_D, std_D = self.text_stats
            return (hidden_BLD - mean_D) / std_D
        return hidden_BLD


def read_text_stats(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """The per-channel (mean, std) of a denoiser's captions."""
    stats = read_tensors(path)
    if set(stats) != {"mean", "std"} or any(t.shape != (width,) for t in stats.values()):
        found = {name: tuple(t.shape) for name, t in stats.items()}
        raise WeightsError(f"{path} holds {found}; expected 'mean' and 'std' of shape ({width},)")
    return stats["mean"].float(), stats["std"].float()


def _dequantized(stored: dict[str, Tensor], config: SmolLM2Config) -> dict[str, Tensor]:
    return {
        name: dequantize(config.layer_format, t) if t.dtype == torch.uint8 else t.float()
        for name, t in stored.items()
    }
