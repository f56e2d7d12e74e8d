"""RMS norm over the channels of every pixel, with an affine map:

    y = x · rsqrt(mean_c(x²) + eps) · weight + bias

Statistics and product are in fp32 whatever the dtype of x, so fp16 activations cannot overflow in
the square. The in-place form works through the pixels in strips that stay in the cache of a CPU.
"""

# B batch   C channels   H height   W width   P pixels of all images

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.strips import for_each

_STRIP_ELEMENTS = 2**18  # 1 MiB of fp32: measured best between 2**15 and 2**18


def rms_norm_2d_ref(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """The formula of this module, one operation at a time."""
    x = x_BCHW.float()
    scale_B1HW = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)
    y = x * scale_B1HW * weight_C.float()[:, None, None]
    if bias_C is not None:
        y = y + bias_C.float()[:, None, None]
    return y.to(x_BCHW.dtype)


def rms_norm_2d(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """RMS norm over dim 1 of [B, C, H, W]; differentiable, keeps the dtype of ``x_BCHW``."""
    y_BHWC = F.rms_norm(x_BCHW.permute(0, 2, 3, 1), weight_C.shape, weight_C, eps)
    if bias_C is not None:
        y_BHWC = y_BHWC + bias_C
    return y_BHWC.permute(0, 3, 1, 2)


def rms_norm_2d_(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float = 1e-5,
    residual_BCHW: Tensor | None = None,
) -> Tensor:
    """Overwrite ``x_BCHW`` with its RMS norm, plus ``residual_BCHW`` when given; no gradient.

    Fast for tensors in the memory format ``channels_last``, right for all.
    """
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    if not x_BHWC.is_contiguous():
        y = rms_norm_2d(x_BCHW, weight_C, bias_C, eps)
        return x_BCHW.copy_(y if residual_BCHW is None else y + residual_BCHW)
    channels = x_BHWC.shape[-1]
    strip = max(1, _STRIP_ELEMENTS // channels)
    weight, bias = weight_C.float(), bias_C.float()
    strips = torch.split(x_BHWC.view(-1, channels), strip)
    residuals: tuple[Tensor, ...] | list[None] = [None] * len(strips)
    if residual_BCHW is not None:
        residuals = torch.split(residual_BCHW.permute(0, 2, 3, 1).reshape(-1, channels), strip)

    def compute(strip: tuple[Tensor, Tensor | None]) -> None:
        _norm_strip(strip[0], weight, bias, eps, strip[1])

    for_each(compute, list(zip(strips, residuals, strict=True)))
    return x_BCHW


def _norm_strip(
    x_PC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, residual_PC: Tensor | None
) -> None:
    y_PC = x_PC.float()  # the same memory when x is fp32
    norm_P1 = torch.linalg.vector_norm(y_PC, dim=-1, keepdim=True)
    y_PC.mul_(norm_P1.square_().div_(x_PC.shape[-1]).add_(eps).rsqrt_())
    torch.addcmul(bias_C, y_PC, weight_C, out=y_PC)
    if residual_PC is not None:
        y_PC.add_(residual_PC)
    if y_PC.dtype != x_PC.dtype:
        x_PC.copy_(y_PC)
