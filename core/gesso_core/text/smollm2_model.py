"""The stack of SmolLM2: a small Llama without its head.

Pre-norm RMSNorm, rotary attention whose key/value heads are shared, SwiGLU. Names of parameters are
those of the published checkpoint.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import ConfigError

# B prompts   L token positions   D width   H query heads   K key/value heads   E head dimension


@dataclass(frozen=True, kw_only=True)
class SmolLM2Config:
    """Shape of the kept stack; names as in the published configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    max_tokens: int = 20
    end_of_text_id: int = 0
    pad_id: int = 0
    layer_format: str = "q4_1"
    embedding_format: str = "q8_0"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not give {self.num_attention_heads} heads "
                "of even dimension"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_file(cls, path: Path) -> "SmolLM2Config":
        """Read a ``config.json``; entries of other programs (``architectures``, …) are ignored."""
        try:
            values = json.loads(path.read_text())
            known = {f.name for f in fields(cls)}
            return cls(**{k: v for k, v in values.items() if k in known})
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} is not a configuration of this text encoder: {error}; "
                "expected the config.json that ships with 'smollm2-l6'"
            ) from error


class Attention(nn.Module):
    """Causal attention with rotary positions; each key/value head serves H/K query heads."""

    def __init__(self, config: SmolLM2Config) -> None:
        super().__init__()
        width, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, key_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q_BHLE, k_BKLE, v_BKLE = (
            project(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHLE, k_BKLE = (rotate(t, cos_LE, sin_LE) for t in (q_BHLE, k_BKLE))
        out_BHLE = F.scaled_dot_product_attention(
            q_BHLE, k_BKLE, v_BKLE, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(out_BHLE.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: SmolLM2Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
        return out


class DecoderLayer(nn.Module):
    """Attention, then SwiGLU, each on the normalized residual stream."""

    def __init__(self, config: SmolLM2Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BLD: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_LE, sin_LE)
        out: Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return out


class SmolLM2(nn.Module):
    """The stack of decoder layers, from token embeddings to the residual stream; no final norm."""

    def __init__(self, config: SmolLM2Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, embeddings_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        cos_LE, sin_LE = rotary_table(self.config, embeddings_BLD.shape[1])
        x_BLD = embeddings_BLD
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_LE, sin_LE)
        return x_BLD


def rotary_table(config: SmolLM2Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, E) for the half-split layout."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length).float(), config.rope_theta**-exponents)
    angles_LE = torch.cat([angles, angles], dim=-1)
    return angles_LE.cos(), angles_LE.sin()


def rotate(t_BHLE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Rotary position embedding: channel i of a head turns together with channel i + E/2."""
    first, second = t_BHLE.chunk(2, dim=-1)
    return t_BHLE * cos_LE + torch.cat([-second, first], dim=-1) * sin_LE
