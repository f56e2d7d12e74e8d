"""The depth transformer: from the language model's state at one position to its D codes.

Causal and pre-norm over at most D positions (VILA-U, arXiv 2409.04429, section 3.2; the head is
that of RQ-VAE Transformer, arXiv 2203.01941). The first input is the state, the others are the sums
of the code vectors chosen so far; each position predicts the next code.

`DepthTransformer.forward` is the teacher-forced pass. For drawing, `begin` and `extend` keep the
keys and values of the positions already seen, and `recomputed` does the same without any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import ConfigError

# R positions of all pictures   D codes of a position   E width   H heads   e channels of a head
# C width of a code vector      S width of the language model's states     K codes in the codebook
# F channels of the fused product: queries, keys and values


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Sizes of the depth transformer; the defaults are those of the published models."""

    depth: int  # D
    codebook: int  # K
    code_width: int  # C
    state_width: int  # S
    width: int = 2560
    heads: int = 40
    layers: int = 6
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.depth, self.codebook, self.code_width, self.state_width, self.layers) < 1:
            raise ConfigError(f"sizes of a depth transformer are at least 1: {self}")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of {self.heads} heads")

    @classmethod
    def from_original(cls, values: Mapping[str, Any]) -> "DepthConfig":
        """From the ``rqtransformer`` section of a published configuration."""
        head = values.get("head") or {}
        block = head.get("block") or {}
        return cls(
            depth=int(values["block_size"][-1]),
            codebook=int(values["vocab_size"]),
            code_width=int(values["input_embed_dim_1"]),
            state_width=int(values["input_embed_dim_2"]),
            width=int(values.get("embed_dim", cls.width)),
            heads=int(block.get("n_head", cls.heads)),
            layers=int(head.get("n_layer", cls.layers)),
            dropout=float(block.get("resid_pdrop", cls.dropout)),
        )

    def to_original(self, grid: tuple[int, int]) -> dict[str, Any]:
        """The inverse of `from_original`; ``grid`` is that of the codes."""
        return {
            "block_size": [*grid, self.depth],
            "input_embed_dim_1": self.code_width,
            "input_embed_dim_2": self.state_width,
            "embed_dim": self.width,
            "vocab_size": self.codebook,
            "head": {
                "n_layer": self.layers,
                "block": {"n_head": self.heads, "resid_pdrop": self.dropout},
            },
        }


class DepthCache:
    """Keys and values of every layer, with room for D positions.

    A position's keys and values lie side by side, as the fused product gives them, so that keeping
    them is one copy.
    """

    def __init__(self, config: DepthConfig, rows: int, like: Tensor) -> None:
        shape = (rows, config.depth, 2 * config.width)
        self.layers = [like.new_empty(shape) for _ in range(config.layers)]
        self.heads, self.length = config.heads, 0

    def append(self, layer: int, both_R2E: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a new position; those of all positions (R, H, D', e)."""
        buffer_RDF, end = self.layers[layer], self.length + 1
        buffer_RDF[:, self.length] = both_R2E
        both = buffer_RDF[:, :end].view(len(both_R2E), end, 2, self.heads, -1)
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values


class DepthBlock(nn.Module):
    """LayerNorm → attention → + → LayerNorm → MLP → +."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x_RDE: Tensor) -> Tensor:
        """(R, D', E) → (R, D', E), causal."""
        q, k, v = (self._split(part) for part in self.qkv(self.norm1(x_RDE)).chunk(3, dim=-1))
        mixed_RHDe = F.scaled_dot_product_attention(q, k, v, is_causal=x_RDE.shape[1] > 1)
        mixed_RDE = self.out(mixed_RHDe.transpose(1, 2).flatten(2))
        x_RDE = x_RDE + F.dropout(mixed_RDE, self.dropout, self.training)
        hidden_RDE = self.project(F.gelu(self.expand(self.norm2(x_RDE))))
        return x_RDE + F.dropout(hidden_RDE, self.dropout, self.training)

    def step(self, x_RE: Tensor, cache: DepthCache, layer: int) -> Tensor:
        """(R, E) → (R, E) of one new position behind those in the cache; for drawing only."""
        rows, width = x_RE.shape
        qkv_RF = self.qkv(self.norm1(x_RE))
        q_RH1e = qkv_RF[:, :width].view(rows, self.heads, 1, -1)
        keys, values = cache.append(layer, qkv_RF[:, width:])
        mixed_RH1e = F.scaled_dot_product_attention(q_RH1e, keys, values)
        x_RE = x_RE + self.out(mixed_RH1e.reshape(rows, width))
        stepped: Tensor = x_RE + self.project(F.gelu(self.expand(self.norm2(x_RE))))
        return stepped

    def _split(self, x_RDE: Tensor) -> Tensor:
        rows, length, width = x_RDE.shape
        return x_RDE.reshape(rows, length, self.heads, width // self.heads).transpose(1, 2)


class DepthTransformer(nn.Module):
    """States and code vectors in, logits of the codes out."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.config = config
        self.from_codes = nn.Linear(config.code_width, config.width)
        self.from_state = nn.Linear(config.state_width, config.width)
        self.position_1DE = nn.Parameter(torch.zeros(1, config.depth, config.width))
        self.blocks = nn.ModuleList(DepthBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.classifier = nn.Linear(config.width, config.codebook)

    def forward(self, state_RS: Tensor, sums_RDC: Tensor) -> Tensor:
        """Teacher-forced logits (…, D, K).

        Args:
            state_RS: states of the language model (…, S).
            sums_RDC: sums over the code vectors 0..d for every depth d, (…, D, C). The last one
                predicts nothing and is not read.
        """
        first_R1E = self.from_state(state_RS.reshape(-1, 1, state_RS.shape[-1]))
        others_RDE = self.from_codes(sums_RDC.reshape(-1, *sums_RDC.shape[-2:])[:, :-1])
        x_RDE = torch.cat([first_R1E, others_RDE], dim=1) + self.position_1DE
        for block in self.blocks:
            x_RDE = block(x_RDE)
        logits_RDK: Tensor = self.classifier(self.norm(x_RDE))
        return logits_RDK.reshape(*state_RS.shape[:-1], *logits_RDK.shape[-2:])

    def begin(self, state_RS: Tensor) -> tuple[Tensor, DepthCache]:
        """Logits (R, K) of the first code of R positions, and the cache for the next."""
        cache = DepthCache(self.config, len(state_RS), state_RS)
        return self._next(self.from_state(state_RS), cache), cache

    def extend(self, sum_RC: Tensor, cache: DepthCache) -> Tensor:
        """Logits (R, K) of the next code, given the sum of the code vectors so far."""
        return self._next(self.from_codes(sum_RC), cache)

    def recomputed(self, state_RS: Tensor, sums_RDC: Tensor) -> Tensor:
        """What `begin` or `extend` answer, (R, K), from all sums so far and without a cache."""
        x_RDE = self.from_state(state_RS)[:, None]
        if sums_RDC.shape[1]:
            x_RDE = torch.cat([x_RDE, self.from_codes(sums_RDC)], dim=1)
        x_RDE = x_RDE + self.position_1DE[:, : x_RDE.shape[1]]
        for block in self.blocks:
            x_RDE = block(x_RDE)
        logits_RK: Tensor = self.classifier(self.norm(x_RDE[:, -1]))
        return logits_RK

    def _next(self, input_RE: Tensor, cache: DepthCache) -> Tensor:
        x_RE = input_RE + self.position_1DE[0, cache.length]
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, DepthBlock)
            x_RE = block.step(x_RE, cache, layer)
        cache.length += 1
        logits_RK: Tensor = self.classifier(self.norm(x_RE))
        return logits_RK
