"""One new token of every row through the layers of a Llama.

The same arithmetic as transformers' own forward, in the same order. That forward serves training,
masks and any cache; for a single token most of its time goes into this generality, not into the
products. Here only the layers are left.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel

# R rows   S state width   H heads, those of keys and values may be fewer   e channels of a head

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Queries, new keys and new values (R, H, 1, e) of a layer → (R, 1, H, e)."""


def is_llama(decoder: nn.Module) -> bool:
    """Whether `llama_step` does what this decoder would do."""
    return type(decoder) is LlamaModel


def llama_step(decoder: Any, x_R1S: Tensor, positions_R1: Tensor, attend: Attend) -> Tensor:
    """States (R, 1, S) behind the final norm.

    Args:
        decoder: see `is_llama`.
        x_R1S: what the new tokens are.
        positions_R1: where they stand.
        attend: keeps the new keys and values, and attends to all of them.
    """
    cos, sin = (table_R1e[:, None] for table_R1e in decoder.rotary_emb(x_R1S, positions_R1))
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inner = _normed(layer.input_layernorm, x_R1S)
        shape = (len(x_R1S), -1, 1, attention.head_dim)
        q, k, v = (
            project(inner).view(shape)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned = _rotated(torch.cat([q, k], dim=1), cos, sin)
        q, k = turned[:, : q.shape[1]], turned[:, q.shape[1] :]
        mixed_R1He = attend(q, k, v, number)
        x_R1S = x_R1S + attention.o_proj(mixed_R1He.flatten(2))
        inner = _normed(layer.post_attention_layernorm, x_R1S)
        x_R1S = x_R1S + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return _normed(decoder.norm, x_R1S)


def _rotated(x_RH1e: Tensor, cos_R11e: Tensor, sin_R11e: Tensor) -> Tensor:
    first, second = x_RH1e.chunk(2, dim=-1)
    return x_RH1e * cos_R11e + torch.cat([-second, first], dim=-1) * sin_R11e


def _normed(norm: Any, x_R1S: Tensor) -> Tensor:
    """The norm in one call; in lower precision its own steps round differently, so they stay."""
    if x_R1S.dtype != torch.float32:
        slow: Tensor = norm(x_R1S)
        return slow
    return F.rms_norm(x_R1S, x_R1S.shape[-1:], norm.weight, norm.variance_epsilon)
