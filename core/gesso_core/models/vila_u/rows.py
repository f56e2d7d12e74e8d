"""Rows of a language model that advance together, each with keys and values of its own length.

transformers' decoders take any cache and any attention function; here the cache keeps one buffer
per row, filled from the left, and the attention works row by row. The new tokens of all rows stand
one behind the other, as if they were one long row. So rows of different lengths, with one new token
or a whole prompt, share every matrix product without any padding between them; they join and leave
a batch without a copy, and a row's numbers do not depend on its neighbours. A buffer is only ever
written behind the length that its owner states: a step that failed can be repeated.
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

# B rows   t new tokens of a row   N new tokens of all rows   T tokens of a row   S state width
# H heads   L layers   e channels of a head   a leading 2 is for keys and values
ATTENTION: Final = "gesso_rows"
# A matrix product rounds the last one to three rows behind a multiple of four differently, on any
# number of threads. In multiples of four a row's numbers do not depend on how many there are.
ROWS_MULTIPLE: Final = 4


@dataclass(frozen=True, eq=False)
class RowCache:
    """Keys and values of one row, with room for as many tokens as it will ever have."""

    both_2LHTe: Tensor

    @property
    def bytes(self) -> int:
        """Memory of the buffer."""
        return self.both_2LHTe.numel() * self.both_2LHTe.element_size()


class _Seen(NamedTuple):
    """Which tokens a layer attends to: those of a forward with caches, in this layer."""

    forward: "_Forward"
    layer: int


class _Forward:
    """The cache that one forward sees: some rows with the lengths they have before it.

    All slices of the buffers are taken here, once for all layers.
    """

    def __init__(
        self, caches: Sequence[RowCache], starts: Sequence[int], counts: Sequence[int], spare: int
    ) -> None:
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self.longest, self.sizes = max(starts), [*counts, spare] if spare else [*counts]
        buffers = [cache.both_2LHTe for cache in caches]
        self._places = [
            both[:, :, :, start:end].unbind(1)
            for both, start, end in zip(buffers, starts, ends, strict=True)
        ]
        self._keys, self._values = (
            [
                both[part, :, None, :, :end].unbind(0)
                for both, end in zip(buffers, ends, strict=True)
            ]
            for part in (0, 1)
        )
        device = buffers[0].device
        self._masks = [
            _tail_mask(count, end, device) for count, end in zip(counts, ends, strict=True)
        ]

    def update(
        self, k_1HNe: Tensor, v_1HNe: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[_Seen, _Seen]:
        """Keep the new keys and values; what is returned stands for all tokens so far."""
        new = torch.cat([k_1HNe, v_1HNe]).split_with_sizes(self.sizes, dim=2)
        for places, both_2Hte in zip(self._places, new, strict=False):  # the spare ones are dropped
            places[layer].copy_(both_2Hte)
        return _Seen(self, layer), _Seen(self, layer)

    def attend(self, q_1HNe: Tensor, k_1HNe: Tensor, v_1HNe: Tensor, layer: int) -> Tensor:
        """Keep the new tokens of every row, and let each see its own row; (1, N, H, e)."""
        self.update(k_1HNe, v_1HNe, layer)
        return self.mixed(q_1HNe, layer, None)

    def mixed(self, q_1HNe: Tensor, layer: int, scaling: float | None) -> Tensor:
        """Each new token with what it sees of its row, (1, N, H, e)."""
        queries = list(q_1HNe.split_with_sizes(self.sizes, dim=2))
        grouped = q_1HNe.shape[1] != self._keys[0][layer].shape[1]
        for b, mask in enumerate(self._masks):
            queries[b] = F.scaled_dot_product_attention(
                queries[b],
                self._keys[b][layer],
                self._values[b][layer],
                attn_mask=mask,
                scale=scaling,
                enable_gqa=grouped,
            )
        # The spare ones see nothing; what they get does not matter.
        return torch.cat(queries, dim=2).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest row; positions are given explicitly, so nothing follows from it."""
        return self.longest


def attention(
    module: nn.Module | None,
    q_BHte: Tensor,
    key: Tensor | _Seen,
    value: Tensor | _Seen,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it: of rows with caches, or ordinary.

    Returns (B, t, H, e). Without caches and without a mask it is causal.
    """
    if isinstance(key, _Seen):
        return key.forward.mixed(q_BHte, key.layer, scaling), None
    assert isinstance(value, Tensor)
    mixed_BHte = F.scaled_dot_product_attention(
        q_BHte,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q_BHte.shape[2] > 1,
        scale=scaling,
        enable_gqa=q_BHte.shape[1] != key.shape[1],
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
        cache = RowCache(like.new_empty((2, self.layers, self.heads, room, self.head_dim)))
        if prefix is not None:
            cache.both_2LHTe[:, :, :, :shared] = prefix.both_2LHTe[:, :, :, :shared]
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
        states_NS = self.together(embeddings_BtS.flatten(0, 1), caches, lengths, [new] * rows)
        return states_NS.view(embeddings_BtS.shape)

    def together(
        self,
        embeddings_NS: Tensor,
        caches: Sequence[RowCache],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> Tensor:
        """States (N, S) of the new tokens of all rows, ``counts`` of each, one row after another.

        See `__call__` for the other arguments.
        """
        embeddings_RS, device = padded_rows(embeddings_NS), embeddings_NS.device
        spare = len(embeddings_RS) - len(embeddings_NS)
        positions = [
            start + index
            for start, count in zip(lengths, counts, strict=True)
            for index in range(count)
        ]
        positions_1R = torch.tensor([[*positions, *[0] * spare]], device=device)
        cache = _Forward(caches, lengths, counts, spare)
        if self.is_llama:
            states = llama_step(self.decoder, embeddings_RS[None], positions_1R, cache.attend)
        else:
            states = self.decoder(
                inputs_embeds=embeddings_RS[None],
                position_ids=positions_1R,
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state
        states_NS: Tensor = states[0, : len(embeddings_NS)]
        return states_NS


def _tail_mask(new: int, total: int, device: torch.device) -> Tensor | None:
    """(t, T) bool: the last t tokens see everything up to themselves."""
    if new == 1:
        return None
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
