"""New tokens of every row through the layers of a Llama.

The same arithmetic as transformers' own forward, in the same order. That forward serves training,
masks and any cache; for a few tokens most of its time goes into this generality, not into the
products. Here only the layers are left.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel

# R rows   t new tokens   S state width   e channels of a head
# H heads, those of keys and values may be fewer

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Queries, new keys and new values (R, H, t, e) of a layer → (R, t, H, e)."""


def is_llama(decoder: nn.Module) -> bool:
    """Whether `llama_step` does what this decoder would do."""
    return type(decoder) is LlamaModel


def llama_step(decoder: Any, x_RtS: Tensor, positions_Rt: Tensor, attend: Attend) -> Tensor:
    """States (R, t, S) behind the final norm.

    Args:
        decoder: see `is_llama`.
        x_RtS: what the new tokens are.
        positions_Rt: where they stand.
        attend: keeps the new keys and values, and attends to all of them.
    """
    cos, sin = (table_Rte[:, None] for table_Rte in decoder.rotary_emb(x_RtS, positions_Rt))
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inner = _normed(layer.input_layernorm, x_RtS)
        shape = (*x_RtS.shape[:2], -1, attention.head_dim)
        q, k, v = (
            project(inner).view(shape).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned = _rotated(torch.cat([q, k], dim=1), cos, sin)
        q, k = turned[:, : q.shape[1]], turned[:, q.shape[1] :]
        mixed_RtHe = attend(q, k, v, number)
        x_RtS = x_RtS + attention.o_proj(mixed_RtHe.flatten(2))
        inner = _normed(layer.post_attention_layernorm, x_RtS)
        x_RtS = x_RtS + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return _normed(decoder.norm, x_RtS)


def _rotated(x_RHte: Tensor, cos_R1te: Tensor, sin_R1te: Tensor) -> Tensor:
    first, second = x_RHte.chunk(2, dim=-1)
    return x_RHte * cos_R1te + torch.cat([-second, first], dim=-1) * sin_R1te


def _normed(norm: Any, x_RtS: Tensor) -> Tensor:
    """The norm in one call; in lower precision its own steps round differently, so they stay."""
    if x_RtS.dtype != torch.float32:
        slow: Tensor = norm(x_RtS)
        return slow
    return F.rms_norm(x_RtS, x_RtS.shape[-1:], norm.weight, norm.variance_epsilon)
