"""Picture metrics: PSNR and SSIM.

Pictures are (B, 3, H, W) in [-1, 1]; results are one number per picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 2.0  # width of the range [-1, 1]
WINDOW = 11
SIGMA = 1.5
MAX_PSNR_DB = 100.0  # reported for identical pictures


def psnr(picture_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,); both sides are clamped to [-1, 1] first."""
    difference = picture_BCHW.float().clamp(-1, 1) - reference_BCHW.float().clamp(-1, 1)
    error = difference.square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=MAX_PSNR_DB)


def ssim(picture_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """Structural similarity, (B,), Gaussian window of 11 pixels (Wang et al. 2004, eq. 13).

    Only windows that lie wholly inside the picture count; a side below 11 pixels is an error.
    """
    x, y = (side.float().clamp(-1, 1) for side in (picture_BCHW, reference_BCHW))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(x_BCHW: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, device=x_BCHW.device) - WINDOW // 2
    line = torch.exp(-(offsets.float() ** 2) / (2 * SIGMA**2))
    line = line / line.sum()
    channels = x_BCHW.shape[1]
    rows = line.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = line.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x_BCHW, rows, groups=channels), columns, groups=channels)
