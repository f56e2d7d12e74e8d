"""The block of HART's transformer: attention and a gated MLP, pre-norm (arXiv 2410.10812).

One RMSNorm weight serves both halves of a block. Queries and values have a bias, keys have none.
The scale of the scores is ``0.25/√d``, or 1 after unit normalisation. The text may modulate a block
in two ways, which the published model does not use.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.layers.kv_cache import KVWriter
from gesso_core.layers.linear import Linear
from gesso_core.layers.tables import normal_table
from gesso_core.models.hart.config import HARTConfig, Pooling
from gesso_core.models.hart.rotary import rotate

# B batch   N slots   D width   H heads   d channels of a head   L text slots

MAX_LOG_SCALE = math.log(100.0)
Table = tuple[Tensor, Tensor]  # cosines and sines, each (B, 1, N, d)


class RMSNorm(nn.Module):
    """Root-mean-square norm: fp32 inside, cast, then the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Softmax attention with rotary positions; keys are kept after their rotation."""

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = Linear(width, width)
        self.log_scale = None
        if config.attention_norm:
            self.log_scale = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.score_scale = 1.0 if config.attention_norm else 0.25 / math.sqrt(self.head_dim)

    def forward(
        self, x_BND: Tensor, table: Table, mask: Tensor | None, cache: tuple[KVWriter, int] | None
    ) -> Tensor:
        """(B, N, D) → (B, N, D).

        Args:
            x_BND: the new slots.
            table: their rotation.
            mask: bool, true where a slot may look, broadcast to (B, H, N, all slots); or None.
            cache: where the keys and values of this layer are appended, or None.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_BNE: Tensor = self.qkv(x_BND) + bias
        qkv_BN3Hd = qkv_BNE.view(*x_BND.shape[:2], 3, self.heads, self.head_dim)
        q, k, v = qkv_BN3Hd.permute(2, 0, 3, 1, 4)
        if self.log_scale is not None:
            scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp().to(q.dtype)
            q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            writer, layer = cache
            k, v = writer.append(layer, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.score_scale)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """``down(SiLU(gate(x)) · up(x))`` without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        out: Tensor = self.down(F.silu(self.gate(x_BND)) * self.up(x_BND))
        return out


class Block(nn.Module):
    """Norm → attention, norm → MLP, each added to its input."""

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp = GatedMLP(width, config.ffn_hidden)
        self.modulation = Linear(width, 6 * width) if config.modulation == "pooled" else None
        self.table = None
        if config.modulation == "shared":
            self.table = normal_table(6, width, scale=width**-0.5)

    def forward(
        self,
        x_BND: Tensor,
        table: Table,
        mask: Tensor | None = None,
        pooled_BD: Tensor | None = None,
        cache: tuple[KVWriter, int] | None = None,
    ) -> Tensor:
        """(B, N, D) → (B, N, D); ``pooled_BD`` is the text that modulates, where it does."""
        parts = self._modulation(pooled_BD)
        if parts is None:
            mixed_BND: Tensor = x_BND + self.attention(self.norm(x_BND), table, mask, cache)
            return mixed_BND + cast(Tensor, self.mlp(self.norm(mixed_BND)))
        gate1, gate2, scale1, scale2, shift1, shift2 = parts
        inner = self.norm(x_BND) * (1 + scale1) + shift1
        mixed_BND = x_BND + self.attention(inner, table, mask, cache) * gate1
        inner = self.norm(mixed_BND) * (1 + scale2) + shift2
        return mixed_BND + cast(Tensor, self.mlp(inner)) * gate2

    def _modulation(self, pooled_BD: Tensor | None) -> tuple[Tensor, ...] | None:
        """Two gates, two scales, two shifts, each (B, 1, D)."""
        if pooled_BD is None:
            return None
        if self.table is not None:
            parts_B6D = self.table + pooled_BD[:, None]
        elif self.modulation is not None:
            parts_B6D = self.modulation(F.silu(pooled_BD)).view(len(pooled_BD), 6, -1)
        else:
            return None
        return parts_B6D[:, :, None].unbind(dim=1)


def pooled_text(text_BLD: Tensor, mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text, (B, D): the maximum over all slots, padding too, or the masked mean."""
    if pooling == "max":
        return text_BLD.amax(dim=1)
    weight_BL1 = mask_BL[..., None].to(text_BLD.dtype)
    return (text_BLD * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)
