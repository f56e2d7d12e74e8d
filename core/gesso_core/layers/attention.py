"""Attention of Sana: ReLU linear self-attention, and softmax cross-attention to the text.

Sources: Sana (arXiv 2410.10629) section 2.2; SANA-1.5 (arXiv 2501.18427) for the norm of queries
and keys.
"""

import torch
import torch.nn.functional as F
from gesso_kernels.relu_linear_attention import relu_linear_attention
from torch import Tensor, nn

from gesso_core.layers.linear import Linear
from gesso_core.layers.modulation import Modulation, modulated

# B batch   N image tokens   L text tokens   D width   H heads   d channels of a head
FP16_MAX = 65_504.0


class ReLULinearAttention(nn.Module):
    """Self-attention with ``relu(q)·relu(k)`` as similarity: linear in the number of tokens.

    The core runs in fp32 whatever the dtype of the weights. The norms of q and k span the full
    width, before the heads are split and before the ReLU.
    """

    def __init__(
        self, width: int, head_dim: int, *, qk_norm: bool, bias: bool = False, eps: float = 1e-15
    ) -> None:
        super().__init__()
        self.heads, self.eps = width // head_dim, eps
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.RMSNorm(width, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(width, eps=1e-5) if qk_norm else None
        self.out = Linear(width, width)

    def forward(self, x_BND: Tensor, modulation: Modulation | None = None) -> Tensor:
        """(B, N, D) → (B, N, D); ``modulation`` is applied to x first."""
        q_BND, k_BND, v_BND = modulated(self.qkv, x_BND, modulation).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q_BND, k_BND = self.q_norm(q_BND), self.k_norm(k_BND)
        with torch.autocast(x_BND.device.type, enabled=False):  # autocast would undo the fp32 core
            q, k, v = (self._split(part) for part in (q_BND, k_BND, v_BND))
            out_BHdN = relu_linear_attention(q, k, v, self.eps)
        mixed_BND = out_BHdN.flatten(1, 2).transpose(1, 2).to(x_BND.dtype)
        out_BND: Tensor = self.out(mixed_BND)
        return out_BND.clip(-FP16_MAX, FP16_MAX) if out_BND.dtype == torch.float16 else out_BND

    def _split(self, x_BND: Tensor) -> Tensor:
        """(B, N, H·d) → (B, H, d, N)."""
        return x_BND.reshape(*x_BND.shape[:-1], self.heads, -1).permute(0, 2, 3, 1)


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to text tokens.

    Keys and values depend on the text alone, so they may be made once (`keys_values`) and used at
    every step.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, qk_norm: bool, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.q = Linear(width, inner)
        self.kv = Linear(width, 2 * inner)
        self.q_norm = nn.RMSNorm(inner, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(inner, eps=norm_eps) if qk_norm else None
        self.out = Linear(inner, width)

    def keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each (B, L, H·d)."""
        k_BLE, v_BLE = self.kv(text_BLD).chunk(2, dim=-1)
        return (k_BLE if self.k_norm is None else self.k_norm(k_BLE)), v_BLE

    def forward(
        self, x_BND: Tensor, keys_values: tuple[Tensor, Tensor], bias_B11L: Tensor | None
    ) -> Tensor:
        """(B, N, D) → (B, N, D); ``bias_B11L`` is added to the scores before the softmax."""
        q_BNE = self.q(x_BND)
        q_BNE = q_BNE if self.q_norm is None else self.q_norm(q_BNE)
        q, k, v = (self._split(part) for part in (q_BNE, *keys_values))
        out_BHNd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11L)
        out_BND: Tensor = self.out(out_BHNd.transpose(1, 2).flatten(2))
        return out_BND

    def _split(self, x_BLE: Tensor) -> Tensor:
        """(B, L, H·d) → (B, H, L, d)."""
        return x_BLE.reshape(*x_BLE.shape[:-1], self.heads, -1).transpose(1, 2)
