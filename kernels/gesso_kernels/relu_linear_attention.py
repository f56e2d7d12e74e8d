"""ReLU linear attention (EfficientViT, Sana): a ReLU kernel instead of softmax, linear in tokens.

    out_i = Σ_j v_j (relu(k_j) · relu(q_i))  /  (Σ_j relu(k_j) · relu(q_i) + eps)

Linear form: with a row of ones appended to v, ``S = v' relu(k)ᵀ`` is a (d+1)×d state, and
``O = S relu(q)`` carries the numerator in its first d rows and the normaliser in its last.
Quadratic form: ``A = relu(k)ᵀ relu(q)`` with columns normalised, ``out = v A``. Both are equal; the
quadratic one is cheaper for at most d tokens.

Everything is computed in fp32: sums over all pixels leave the range of fp16 and the digits of bf16.
A query that is negative everywhere has the normaliser 0 and yields 0, not NaN.
"""

# B batch   H heads   D head dimension   N tokens

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_linear_attention_ref(
    q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float = 1e-15
) -> Tensor:
    """The linear form, written as in the formula."""
    q, k = q_BHDN.float().relu(), k_BHDN.float().relu()
    v = F.pad(v_BHDN.float(), (0, 0, 0, 1), value=1.0)
    out = (v @ k.mT) @ q
    return (out[..., :-1, :] / (out[..., -1:, :] + eps)).to(v_BHDN.dtype)


def relu_quadratic_attention_ref(
    q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float = 1e-15
) -> Tensor:
    """The quadratic form: the N×N weights are built, each column sums to one."""
    weights_BHNN = k_BHDN.float().relu().mT @ q_BHDN.float().relu()
    weights_BHNN = weights_BHNN / (weights_BHNN.sum(dim=-2, keepdim=True) + eps)
    return (v_BHDN.float() @ weights_BHNN).to(v_BHDN.dtype)


def relu_linear_attention(
    q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float = 1e-15
) -> Tensor:
    """ReLU attention over [B, H, D, N] (channels before tokens), in whichever form is cheaper.

    The core is fp32 for every dtype; the result has the dtype of ``v_BHDN``.
    """
    head_dim, tokens = q_BHDN.shape[-2:]
    if tokens <= head_dim:
        return relu_quadratic_attention_ref(q_BHDN, k_BHDN, v_BHDN, eps)
    return relu_linear_attention_ref(q_BHDN, k_BHDN, v_BHDN, eps)


def relu_linear_attention_tokens(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, eps: float = 1e-15
) -> Tensor:
    """ReLU attention over [B, N, H, D] (tokens before channels), linear form; no gradient needed.

    Works on strided views without copying them when they are fp32. The normaliser is a product of
    q with the sum of all k instead of a row of ones in v. The result is fp32.
    """
    q, k, v = (t.transpose(1, 2).float() for t in (q_BNHD, k_BNHD, v_BNHD))
    q, k = q.relu(), k.relu()
    state_BHDE = torch.cat([k.mT @ v, k.sum(dim=-2).unsqueeze(-1)], dim=-1)
    out_BHNE = q @ state_BHDE
    out_BHND = out_BHNE[..., :-1] / (out_BHNE[..., -1:] + eps)
    return out_BHND.transpose(1, 2)
