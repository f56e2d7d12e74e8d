"""ReLU linear attention (EfficientViT, Sana): a ReLU kernel instead of softmax, linear in tokens.

    out_i = Σ_j v_j (relu(k_j) · relu(q_i))  /  (Σ_j relu(k_j) · relu(q_i) + eps)

Linear form: with a row of ones appended to v, ``S = v' relu(k)ᵀ`` is a (d+1)×d state, and
``O = S relu(q)`` carries the numerator in its first d rows and the normaliser in its last.
Quadratic form: ``A = relu(k)ᵀ relu(q)`` with columns normalised, ``out = v A``. Both are equal; the
quadratic one is cheaper for at most d tokens.

Everything is computed in fp32: sums over all pixels leave the range of fp16 and the digits of bf16.
A query that is negative everywhere has the normaliser 0 and yields 0, not NaN.

The CUDA kernel works in two passes over chunks of tokens: the state of every chunk goes to a
scratch buffer; then each program adds up the states of its head, always in the same order, and
applies the sum to its queries. The split depends on N alone, so neither a second run nor another
batch size changes a bit. Tensors are read in place through their strides.
"""

# B batch   H heads   D head dimension   N tokens   E = D, channels of the values

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.compile_spec import ARCHS, CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.triton_import import tl, triton

# Least tokens of a chunk, and most chunks.
MIN_CHUNK, MAX_CHUNKS = 256, 8
# States of wider heads would not fit into the registers; these take the path of plain torch.
MAX_HEAD_DIM = 64


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


@triton.jit
def _load_tokens(at, token, tokens, channel, channels, by_token, by_channel):  # type: ignore[no-untyped-def]
    """(tokens, channels) of one head, zero beyond both."""
    keep = (token < tokens)[:, None] & (channel < channels)[None, :]
    offset = token.to(tl.int64)[:, None] * by_token + channel[None, :] * by_channel
    return tl.load(at + offset, keep, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _state_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    partial,
    tokens,
    chunk,
    channels,
    k_sample,
    k_head,
    k_channel,
    k_token,
    v_sample,
    v_head,
    v_channel,
    v_token,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ relu(k) vᵀ and Σ relu(k) over one chunk of tokens of one head."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    k += sample * k_sample + head.to(tl.int64) * k_head
    v += sample * v_sample + head.to(tl.int64) * v_head
    state_DE = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        k_ND = _load_tokens(k, token, end, channel, channels, k_token, k_channel)
        v_NE = _load_tokens(v, token, end, channel, channels, v_token, v_channel)
        k_ND = tl.where(k_ND < 0, 0.0, k_ND).to(k_ND.dtype)  # keeps NaN, as torch does
        # Products of 16-bit numbers are exact in the fp32 accumulator.
        state_DE = tl.dot(tl.trans(k_ND), v_NE, state_DE, input_precision="tf32x3")
        sum_D += tl.sum(k_ND.to(tl.float32), 0)
    slot = (sample * tl.num_programs(0) + head) * tl.num_programs(1) + part
    partial += slot * ((BLOCK_D + 1) * BLOCK_D)
    tl.store(partial + channel[:, None] * BLOCK_D + channel[None, :], state_DE)
    tl.store(partial + BLOCK_D * BLOCK_D + channel, sum_D)


@triton.jit  # type: ignore[untyped-decorator]
def _apply_kernel(  # type: ignore[no-untyped-def]
    q,
    partial,
    out,
    tokens,
    chunk,
    channels,
    q_sample,
    q_head,
    q_channel,
    q_token,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """The state of a head applied to one chunk of queries; ``out`` is (B, N, H, D)."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, parts = tl.num_programs(0), tl.num_programs(1)
    channel = tl.arange(0, BLOCK_D)
    q += sample * q_sample + head.to(tl.int64) * q_head
    out += (sample * tokens * heads + head) * channels
    partial += (sample * heads + head) * parts * ((BLOCK_D + 1) * BLOCK_D)
    state_DE = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for other in tl.static_range(MAX_CHUNKS):  # unrolled: all loads are on their way at once
        known = channel < tl.where(other < parts, BLOCK_D, 0)
        rows = partial + other * ((BLOCK_D + 1) * BLOCK_D)
        at = rows + channel[:, None] * BLOCK_D + channel[None, :]
        state_DE += tl.load(at, known[:, None], other=0.0)
        sum_D += tl.load(rows + BLOCK_D * BLOCK_D + channel, known, other=0.0)
    end = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        q_ND = _load_tokens(q, token, end, channel, channels, q_token, q_channel).to(tl.float32)
        q_ND = tl.where(q_ND < 0, 0.0, q_ND)
        # The state has 24 bits: three products of 11 bits each keep them.
        out_NE = tl.dot(q_ND, state_DE, input_precision="tf32x3")
        norm_N = tl.sum(q_ND * sum_D[None, :], 1) + eps
        keep = (token < end)[:, None] & (channel < channels)[None, :]
        offset = token.to(tl.int64)[:, None] * heads * channels + channel[None, :]
        tl.store(out + offset, (out_NE / norm_N[:, None]).to(out.dtype.element_ty), keep)


def _state_config(itemsize: int) -> dict[str, int]:
    """fp32 tiles are split in three for the tensor cores; larger ones than this would spill."""
    step, stages = (32, 1) if itemsize > 2 else (128, 2)
    return {"BLOCK_N": step, "num_warps": 4, "num_stages": stages}


def _apply_config(block: int) -> dict[str, int]:
    return {"BLOCK_N": 64, "num_warps": 8 if block > 32 else 4, "num_stages": 2}


def compile_specs() -> list[CompileSpec]:
    """Heads of 32 channels (Sana, DC-AE) in 16 and 32 bit, and the widest in 16 bit."""
    return [
        spec
        for kind, block in (("bf16", 32), ("fp32", 32), ("bf16", MAX_HEAD_DIM))
        for spec in (
            _spec("state", _state_kernel, kind, block, _state_config(4 if kind == "fp32" else 2)),
            _spec("apply", _apply_kernel, kind, block, _apply_config(block)),
        )
    ]


def _tensor_core(*, small: bool) -> dict[int, str]:
    """The instruction of each architecture; products of fewer than 64 rows use the oldest."""
    newer = {} if small else {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}
    return dict.fromkeys(ARCHS, " HMMA.") | newer


def _spec(which: str, kernel: Any, kind: str, block: int, config: dict[str, int]) -> CompileSpec:
    types = {**dict.fromkeys(("q", "k", "v", "out"), f"*{kind}"), "partial": "*fp32", "eps": "fp32"}
    fixed = {"BLOCK_D": block, "MAX_CHUNKS": MAX_CHUNKS, "BLOCK_N": config["BLOCK_N"]}
    # Triton makes a stride of 1 a constant at launch; it is that of the channels.
    fixed |= dict.fromkeys(("q_channel", "k_channel", "v_channel"), 1)
    names: list[str] = kernel.arg_names
    return CompileSpec(
        name=f"relu_linear_attention_{which}_{kind}_{block}",
        kernel=kernel,
        signature={name: types.get(name, "i32") for name in names if name not in fixed},
        constexprs={name: value for name, value in fixed.items() if name in names},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        expects=_tensor_core(small=kernel is _state_kernel and block < 64),
        max_registers=255 if block > 32 else 168,
    )


@on_its_device
def relu_linear_attention_triton(
    q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float = 1e-15
) -> Tensor:
    """The kernel, on views of any strides; the result is contiguous as (B, N, H, D)."""
    batch, heads, channels, tokens = v_BHDN.shape
    if channels > MAX_HEAD_DIM:
        raise UnsupportedMode(
            f"a head of {channels} channels; the kernel takes up to {MAX_HEAD_DIM}: "
            "use relu_linear_attention_ref"
        )
    out_BNHD = v_BHDN.new_empty(batch, tokens, heads, channels)
    if not out_BNHD.numel():
        return out_BNHD.permute(0, 2, 3, 1)
    if k_BHDN.dtype != v_BHDN.dtype:  # the product of a tensor core has one type of operands
        both = torch.promote_types(k_BHDN.dtype, v_BHDN.dtype)
        k_BHDN, v_BHDN = k_BHDN.to(both), v_BHDN.to(both)
    chunk = _chunk(tokens)
    parts = triton.cdiv(tokens, chunk)
    block = max(16, triton.next_power_of_2(channels))
    partial = v_BHDN.new_empty(batch, heads, parts, block + 1, block, dtype=torch.float32)
    grid, sizes = (heads, parts, batch), (tokens, chunk, channels)
    _state_kernel[grid](
        k_BHDN,
        v_BHDN,
        partial,
        *sizes,
        *k_BHDN.stride(),
        *v_BHDN.stride(),
        BLOCK_D=block,
        **_state_config(v_BHDN.itemsize),
    )
    _apply_kernel[grid](
        q_BHDN,
        partial,
        out_BNHD,
        *sizes,
        *q_BHDN.stride(),
        eps,
        BLOCK_D=block,
        MAX_CHUNKS=MAX_CHUNKS,
        **_apply_config(block),
    )
    return out_BNHD.permute(0, 2, 3, 1)


def _chunk(tokens: int) -> int:
    """Tokens of a chunk: a function of N alone, so that a batch does not change its samples."""
    least = max(MIN_CHUNK, -(-tokens // MAX_CHUNKS))
    return -(-least // MIN_CHUNK) * MIN_CHUNK


@torch.library.custom_op("gesso::relu_linear_attention", mutates_args=())
def relu_linear_attention_op(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """The registered op, tokens before heads: (B, N, H, D); the kernel on CUDA, torch elsewhere."""
    kernel = v.is_cuda and v.shape[-2] <= MAX_HEAD_DIM
    function = relu_linear_attention_triton if kernel else _cheaper_form
    return function(q, k, v, eps).permute(0, 3, 1, 2).contiguous()


@relu_linear_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    batch, heads, channels, tokens = v.shape
    return v.new_empty(batch, tokens, heads, channels)


def _cheaper_form(q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float) -> Tensor:
    head_dim, tokens = q_BHDN.shape[-2:]
    if tokens <= head_dim:
        return relu_quadratic_attention_ref(q_BHDN, k_BHDN, v_BHDN, eps)
    return relu_linear_attention_ref(q_BHDN, k_BHDN, v_BHDN, eps)


def relu_linear_attention(
    q_BHDN: Tensor, k_BHDN: Tensor, v_BHDN: Tensor, eps: float = 1e-15
) -> Tensor:
    """ReLU attention over [B, H, D, N] (channels before tokens), in whichever form is cheaper.

    The core is fp32 for every dtype; the result has the dtype of ``v_BHDN``. Differentiable; on
    CUDA, with gradients it runs in plain torch.
    """
    if calls_op(q_BHDN, k_BHDN, v_BHDN):
        out_BNHD: Tensor = relu_linear_attention_op(q_BHDN, k_BHDN, v_BHDN, eps)
        return out_BNHD.permute(0, 2, 3, 1)
    return _cheaper_form(q_BHDN, k_BHDN, v_BHDN, eps)


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
