"""Rows of a language model that advance together, each with keys and values of its own length.

transformers' decoders take any cache and any attention function; here the cache keeps one buffer
per row, filled from the left, and the attention works row by row. So rows of different lengths
share every matrix product without any padding, they join and leave a batch without a copy, and a
row's numbers do not depend on its neighbours. A buffer is only ever written behind the length that
its owner states: a step that failed can be repeated.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gesso_core.models.vila_u.llama_step import is_llama, llama_step

# B rows   t new tokens of every row   S state width   H heads   L layers   e channels of a head
ATTENTION: Final = "gesso_rows"
# A matrix product rounds the last one to three rows behind a multiple of four differently, on any
# number of threads. In multiples of four a row's numbers do not depend on how many there are.
ROWS_MULTIPLE: Final = 4


@dataclass(frozen=True, eq=False)
class RowCache:
    """Keys and values of one row, with room for as many tokens as it will ever have."""

    keys_LHTe: Tensor
    values_LHTe: Tensor

    @property
    def bytes(self) -> int:
        """Memory of both buffers."""
        return 2 * self.keys_LHTe.numel() * self.keys_LHTe.element_size()


class _Ragged(NamedTuple):
    """The keys or values of one layer, one tensor (H, tokens, e) per row."""

    rows: list[Tensor]


class _Rows:
    """The cache that one forward sees: some rows with the lengths they have before it."""

    def __init__(self, caches: Sequence[RowCache], lengths: Sequence[int]) -> None:
        self.caches, self.lengths = caches, lengths

    def update(
        self, k_BHte: Tensor, v_BHte: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[_Ragged, _Ragged]:
        """Keep the new keys and values; returns those of all tokens so far."""
        new = k_BHte.shape[2]
        ends = [start + new for start in self.lengths]
        keys, values = [], []
        for b, (cache, start, end) in enumerate(zip(self.caches, self.lengths, ends, strict=True)):
            buffer_HTe = cache.keys_LHTe[layer]
            buffer_HTe[:, start:end] = k_BHte[b]
            keys.append(buffer_HTe[:, :end])
            buffer_HTe = cache.values_LHTe[layer]
            buffer_HTe[:, start:end] = v_BHte[b]
            values.append(buffer_HTe[:, :end])
        return _Ragged(keys), _Ragged(values)

    def attend(self, q_BHte: Tensor, k_BHte: Tensor, v_BHte: Tensor, layer: int) -> Tensor:
        """Keep the new tokens of every row, and attend to all of them; (B, t, H, e)."""
        return attention(None, q_BHte, *self.update(k_BHte, v_BHte, layer), None)[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest row; positions are given explicitly, so nothing follows from it."""
        return max(self.lengths)


def attention(
    module: nn.Module | None,
    q_BHte: Tensor,
    key: Tensor | _Ragged,
    value: Tensor | _Ragged,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it: of rows with caches, or ordinary.

    Returns (B, t, H, e). Without caches and without a mask it is causal.
    """
    grouped = q_BHte.shape[1] != _heads(key)
    if isinstance(key, _Ragged) and isinstance(value, _Ragged):
        new = q_BHte.shape[2]
        mixed = [
            F.scaled_dot_product_attention(
                q_BHte[b : b + 1],
                k_HTe[None],
                v_HTe[None],
                attn_mask=_tail_mask(new, k_HTe),
                scale=scaling,
                enable_gqa=grouped,
            )
            for b, (k_HTe, v_HTe) in enumerate(zip(key.rows, value.rows, strict=True))
        ]
        # Rows without a cache are spare; what they get does not matter.
        mixed += [mixed[-1]] * (len(q_BHte) - len(mixed))
        return torch.cat(mixed).transpose(1, 2), None
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    mixed_BHte = F.scaled_dot_product_attention(
        q_BHte,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q_BHte.shape[2] > 1,
        scale=scaling,
        enable_gqa=grouped,
    )
    return mixed_BHte.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


def use_row_attention(llm: PreTrainedModel) -> None:
    """Let a decoder of transformers use the attention above; its weights and names stay."""
    llm.config._attn_implementation = ATTENTION


def spare_rows(rows: int) -> int:
    """How many rows to add, so that the others come out the same in every batch."""
    return -rows % ROWS_MULTIPLE


def padded_rows(x_RS: Tensor) -> Tensor:
    """The rows with spare ones behind them."""
    spare = spare_rows(len(x_RS))
    return torch.cat([x_RS, x_RS[-1:].expand(spare, -1)]) if spare else x_RS


class RowRunner:
    """Feeds embeddings to the rows of a decoder and returns the states behind its final norm."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self.decoder = llm.get_decoder()
        self.table, self.head = llm.get_input_embeddings(), llm.get_output_embeddings()
        config = llm.config
        self.layers = int(config.num_hidden_layers)
        self.heads = int(getattr(config, "num_key_value_heads", config.num_attention_heads))
        default = config.hidden_size // config.num_attention_heads
        self.head_dim = int(getattr(config, "head_dim", None) or default)
        names = inspect.signature(inspect.unwrap(type(self.decoder).forward)).parameters
        self.cache_argument = "cache" if "cache" in names else "past_key_values"
        self.is_llama = is_llama(self.decoder)

    def new_cache(
        self, room: int, like: Tensor, prefix: RowCache | None = None, shared: int = 0
    ) -> RowCache:
        """An empty cache, or one that begins with the first ``shared`` tokens of another."""
        shape = (self.layers, self.heads, room, self.head_dim)
        cache = RowCache(like.new_empty(shape), like.new_empty(shape))
        if prefix is not None:
            cache.keys_LHTe[:, :, :shared] = prefix.keys_LHTe[:, :, :shared]
            cache.values_LHTe[:, :, :shared] = prefix.values_LHTe[:, :, :shared]
        return cache

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Memory that one token of one row takes."""
        return 2 * self.layers * self.heads * self.head_dim * dtype.itemsize

    def __call__(
        self, embeddings_BtS: Tensor, caches: Sequence[RowCache], lengths: Sequence[int]
    ) -> Tensor:
        """States (B, t, S) of t new tokens of every row.

        Args:
            embeddings_BtS: what the new tokens are.
            caches: one per row; the new keys and values are written behind ``lengths``.
            lengths: tokens that each row has so far, which are the positions of the new ones.
        """
        rows, new = embeddings_BtS.shape[:2]
        spare = spare_rows(rows) if new == 1 else 0
        starts = [*lengths, *[lengths[-1]] * spare]
        if spare:  # more rows for the matrix products; nobody attends to them
            embeddings_BtS = torch.cat([embeddings_BtS, embeddings_BtS[-1:].expand(spare, -1, -1)])
        starts_B1 = torch.tensor(starts, device=embeddings_BtS.device)[:, None]
        positions_Bt = starts_B1 + torch.arange(new, device=embeddings_BtS.device)
        cache = _Rows(caches, lengths)
        if self.is_llama:
            return llama_step(self.decoder, embeddings_BtS, positions_Bt, cache.attend)[:rows]
        output = self.decoder(
            inputs_embeds=embeddings_BtS,
            position_ids=positions_Bt,
            use_cache=True,
            **{self.cache_argument: cache},
        )
        states_BtS: Tensor = output.last_hidden_state[:rows]
        return states_BtS


def _tail_mask(new: int, k_HTe: Tensor) -> Tensor | None:
    """(t, T) bool: the last t tokens see everything up to themselves."""
    if new == 1:
        return None
    total = k_HTe.shape[1]
    return torch.ones(new, total, dtype=torch.bool, device=k_HTe.device).tril(total - new)


def _heads(key: Tensor | _Ragged) -> int:
    return key.shape[1] if isinstance(key, Tensor) else key.rows[0].shape[0]
