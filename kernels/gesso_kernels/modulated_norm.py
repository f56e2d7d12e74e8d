"""LayerNorm without an affine map, then the modulation of a diffusion transformer:

    y = (x − mean(x)) / sqrt(var(x) + eps) · (1 + scale) + shift

Mean and (biased) variance are over the channels of a token; scale and shift belong to a sample.
The kernel reads a token once and rounds once; plain torch rounds after each of its operations.
"""

# B batch   N tokens   D width

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.dispatch import calls_op, on_its_device
from gesso_kernels.triton_import import tl, triton


def modulated_norm_ref(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6
) -> Tensor:
    """The formula of this module in plain torch; differentiable."""
    normed_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)
    return torch.addcmul(shift_B1D, normed_BND, 1 + scale_B1D).to(x_BND.dtype)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _modulated_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    shift,
    scale,
    y,
    tokens,
    width,
    x_sample,
    x_token,
    shift_sample,
    scale_sample,
    eps,
    BLOCK_D: tl.constexpr,
):
    """One token per program, its whole width in registers; statistics in fp32, in two passes."""
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    keep = channel < width
    value = tl.load(x + sample * x_sample + token * x_token + channel, keep, other=0.0)
    value = value.to(tl.float32)
    centered = tl.where(keep, value - tl.sum(value, 0) / width, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered, 0) / width + eps)
    gain = 1.0 + tl.load(scale + sample * scale_sample + channel, keep, other=0.0).to(tl.float32)
    offset = tl.load(shift + sample * shift_sample + channel, keep, other=0.0).to(tl.float32)
    result = tl.fma(normed, gain, offset).to(y.dtype.element_ty)
    tl.store(y + (sample * tokens + token) * width + channel, result, keep)


def _warps(block: int) -> int:
    """At most 32 channels per thread."""
    return min(max(block // 1024, 4), 16)


def compile_specs() -> list[CompileSpec]:
    """Widths of Sana: 1152 (0.6B) and 2240 (1.6B)."""
    integers = ("tokens", "width", "x_sample", "x_token", "shift_sample", "scale_sample")
    pointers = dict.fromkeys(("x", "shift", "scale", "y"), "*bf16")
    return [
        CompileSpec(
            name=f"modulated_norm_{block}",
            kernel=_modulated_norm_kernel,
            signature={**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
            constexprs={"BLOCK_D": block},
            num_warps=_warps(block),
            num_stages=1,
            max_registers=128,
        )
        for block in (2048, 4096)
    ]


@on_its_device
def modulated_norm_triton(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6
) -> Tensor:
    """The kernel; x may be strided over samples and tokens, scale and shift over samples."""
    batch, tokens, width = x_BND.shape
    x, shift, scale = (
        t if t.stride(-1) == 1 else t.contiguous()
        for t in (x_BND, shift_B1D.expand(batch, 1, width), scale_B1D.expand(batch, 1, width))
    )
    y_BND = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    if not y_BND.numel():
        return y_BND
    block = triton.next_power_of_2(width)
    _modulated_norm_kernel[(tokens, batch)](
        x,
        shift,
        scale,
        y_BND,
        tokens,
        width,
        x.stride(0),
        x.stride(1),
        shift.stride(0),
        scale.stride(0),
        eps,
        BLOCK_D=block,
        num_warps=_warps(block),
        num_stages=1,
    )
    return y_BND


@torch.library.custom_op("gesso::modulated_norm", mutates_args=())
def modulated_norm_op(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The registered op: the kernel on CUDA, the reference elsewhere."""
    function = modulated_norm_triton if x.is_cuda else modulated_norm_ref
    return function(x, shift, scale, eps).contiguous()


@modulated_norm_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def modulated_norm(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6
) -> Tensor:
    """LayerNorm over D, times ``1 + scale``, plus ``shift``.

    Args:
        x_BND: tokens.
        shift_B1D: offset of each sample and channel, or of all samples (B = 1).
        scale_B1D: gain of each sample and channel less one, or of all samples.
        eps: added to the variance.

    Returns:
        (B, N, D) in the dtype of x. Differentiable; with gradients it runs in plain torch.
    """
    if calls_op(x_BND, shift_B1D, scale_B1D):
        y_BND: Tensor = modulated_norm_op(x_BND, shift_B1D, scale_B1D, eps)
        return y_BND
    return modulated_norm_ref(x_BND, shift_B1D, scale_B1D, eps)
