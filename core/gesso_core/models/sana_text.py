"""The text side of Sana: from the states of a text encoder to what every block attends to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.layers.linear import Linear

# B batch   L text tokens   S text channels   D width   E width of the cross-attention

KeysValues = tuple[Tensor, Tensor]
# Added to the score of a masked token; −inf would turn a fully masked row into NaN.
MASKED = -10_000.0
# Tokens; whole vectors of 512 bits in fp32.
ALIGNMENT = 16


@dataclass(frozen=True)
class TextContext:
    """What the blocks need of a text: made once by `Sana.encode_text`, used at every step.

    Attributes:
        keys_values: per block, keys and values (B, L, E).
        bias: (B, 1, 1, L), added to the attention scores; None where every token counts.
    """

    keys_values: tuple[KeysValues, ...]
    bias: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of texts."""
        return self.keys_values[0][0].shape[0]

    @property
    def tokens(self) -> int:
        """Length that the texts are padded to."""
        return self.keys_values[0][0].shape[1]

    def aligned(self) -> "TextContext":
        """The same texts at a length and with a bias that do not depend on their neighbours.

        Sums over masked tokens are sums with zeros, but in another order wherever the length ends
        in the middle of a vector, and without a bias attention takes another kernel. Those last
        bits would decide about codes of quantized inputs, and so about the picture.
        """
        padded = self._padded(-(-self.tokens // ALIGNMENT) * ALIGNMENT)
        return TextContext(padded.keys_values, padded._full_bias())

    def select(self, rows: slice) -> "TextContext":
        """Some of the texts, as views."""
        bias = None if self.bias is None else self.bias[rows]
        return TextContext(tuple((k[rows], v[rows]) for k, v in self.keys_values), bias)

    @staticmethod
    def concatenate(contexts: Sequence["TextContext"]) -> "TextContext":
        """One batch of several contexts; shorter texts are padded with masked tokens."""
        if len(contexts) == 1:
            return contexts[0]
        length = max(context.tokens for context in contexts)
        padded = [context._padded(length) for context in contexts]
        keys_values = tuple(
            (torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]))
            for parts in zip(*(context.keys_values for context in padded), strict=True)
        )
        if all(context.bias is None for context in padded):
            return TextContext(keys_values)
        return TextContext(keys_values, torch.cat([context._full_bias() for context in padded]))

    def _full_bias(self) -> Tensor:
        keys = self.keys_values[0][0]
        return keys.new_zeros(self.batch, 1, 1, self.tokens) if self.bias is None else self.bias

    def _padded(self, length: int) -> "TextContext":
        extra = length - self.tokens
        if extra == 0:
            return self
        keys_values = tuple(
            (F.pad(k, (0, 0, 0, extra)), F.pad(v, (0, 0, 0, extra))) for k, v in self.keys_values
        )
        return TextContext(keys_values, F.pad(self._full_bias(), (0, extra), value=MASKED))


class CaptionEmbedding(nn.Module):
    """Text states → Linear → GELU (tanh form) → Linear → RMSNorm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(channels, width)
        self.out = Linear(width, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, text_BLS: Tensor) -> Tensor:
        """(B, L, S) → (B, L, D)."""
        tokens_BLD: Tensor = self.norm(self.out(F.gelu(self.hidden(text_BLS), approximate="tanh")))
        return tokens_BLD


def mask_bias(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, L), added to attention scores: 0 where a token counts, else -10000."""
    return ((1 - mask_BL.to(dtype)) * MASKED)[:, None, None]


def without_padding(text_BLS: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the columns that no text uses; attention gives them a weight of exactly zero anyway.

    Where a text has no valid token nothing is dropped: there, attention is uniform over all.
    """
    if torch.compiler.is_compiling() or mask_BL.device.type == "meta":
        return text_BLS, mask_BL
    used_BL = mask_BL.bool()
    if not used_BL.any(dim=1).all():
        return text_BLS, mask_BL
    length = int(used_BL.any(dim=0).nonzero().max()) + 1
    kept_BL = mask_BL[:, :length]
    return text_BLS[:, :length], None if used_BL[:, :length].all() else kept_BL
