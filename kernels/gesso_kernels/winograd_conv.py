"""3×3 convolution by Winograd's minimal filtering: fewer multiplications, same result.

    Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A

An m×m tile of the output takes (m+2)² products per channel pair instead of 9m²: 4 times fewer for
m = 4 (used in fp32), 2.25 times for m = 2 (used in 16 bit, whose matrices are 0, ±1, ±1/2 and
therefore exact). Written for CPUs: gather the tiles, one small matrix product per transform, one
product over channels per transform coefficient; in strips, so that everything stays in the cache.

The kernel transform is repeated at every call: cheap next to the products of a large image, and no
second copy of the weights has to be kept.
"""

# B batch   C input channels   O output channels   H height   W width
# K transform coefficients (m+2)²   T tiles of a strip   N rows of tiles in a strip

from functools import cache
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso_kernels.strips import even_parts, for_each

_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 0.5, -2.0)}  # the last point is infinity
# A strip is read once per transform coefficient, and the weights are read once per strip.
_STRIP_ELEMENTS = (2**21, 2**22)
# glibc hands blocks of 32 MiB and more back to the system at once; getting their pages again costs
# more than computing what they hold.
_KERNEL_ELEMENTS = 6 * 2**20


def winograd_conv2d_ref(x_BCHW: Tensor, taps_9OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """The direct convolution, padding 1, that `winograd_conv2d` reproduces."""
    weight_OC33 = taps_9OC.view(3, 3, *taps_9OC.shape[1:]).permute(2, 3, 0, 1)
    return F.conv2d(x_BCHW, weight_OC33, bias_O, padding=1)


def tile_size(dtype: torch.dtype) -> int:
    """m: side of an output tile; height and width of an image must be multiples of it."""
    return 4 if dtype in (torch.float32, torch.float64) else 2


def winograd_conv2d(
    x_BCHW: Tensor,
    taps_9OC: Tensor,
    bias_O: Tensor | None = None,
    activation: Literal["none", "relu", "silu"] = "none",
) -> Tensor:
    """3×3 convolution with padding 1 and stride 1, then the activation; no gradient.

    Args:
        x_BCHW: image whose sides are multiples of ``tile_size(dtype)``.
        taps_9OC: the kernel, one [O, C] matrix per tap, taps row by row.
        bias_O: added before the activation.
        activation: applied to the result.

    Returns:
        [B, O, H, W] in the memory format ``channels_last``.
    """
    batch, _, height, width = x_BCHW.shape
    m = tile_size(x_BCHW.dtype)
    kernels = _transform_kernel(taps_9OC, m)
    y_BHWO = x_BCHW.new_empty(batch, height, width, taps_9OC.shape[1])

    def compute(strip: tuple[Tensor, Tensor, int, int]) -> None:
        image_HWC, out_HWO, top, bottom = strip
        y = _filter(_gather_tiles(image_HWC, top, bottom, m), kernels, m)
        if bias_O is not None:
            y.add_(bias_O)
        _activate_(y, activation)
        y = y.view(m, m, (bottom - top) // m, width // m, -1).permute(2, 0, 3, 1, 4)
        out_HWO[top:bottom].view(y.shape).copy_(y)

    spans = _spans(height, width, taps_9OC, m)
    images = zip(x_BCHW.permute(0, 2, 3, 1), y_BHWO, strict=True)
    for_each(compute, [(*image, *span) for image in images for span in spans])
    return y_BHWO.permute(0, 3, 1, 2)


def _spans(height: int, width: int, taps_9OC: Tensor, m: int) -> list[tuple[int, int]]:
    """First and last row of each strip."""
    least, most = _STRIP_ELEMENTS
    elements = min(most, max(least, (m + 2) ** 2 * taps_9OC[0].numel() // 2))
    row_elements = (m + 2) ** 2 * (width // m) * taps_9OC.shape[2]
    parts = even_parts(height // m, max(1, elements // row_elements))
    ends = [m * end for end in accumulate(parts)]
    return list(zip([0, *ends], ends, strict=False))


def _gather_tiles(image_HWC: Tensor, top: int, bottom: int, m: int) -> Tensor:
    """Overlapping (m+2)×(m+2) tiles of the rows ``top:bottom``, zero outside: [K, T·C]."""
    height, width, channels = image_HWC.shape
    padded = image_HWC.new_zeros(bottom - top + 2, width + 2, channels)
    low, high = max(top - 1, 0), min(bottom + 1, height)
    padded[low - top + 1 : high - top + 1, 1:-1] = image_HWC[low:high]
    size = (m + 2, m + 2, (bottom - top) // m, width // m, channels)
    row, column, one = padded.stride()
    tiles = padded.as_strided(size, (row, column, m * row, m * column, one))
    return tiles.reshape((m + 2) ** 2, -1)


def _transform_kernel(taps_9OC: Tensor, m: int) -> list[Tensor]:
    """G g Gᵀ as [K, o, C] slices of output channels, each small enough to reuse freed memory."""
    _, outputs, channels = taps_9OC.shape
    _, transform, _ = _transforms(m, taps_9OC.dtype)
    parts = even_parts(outputs, max(1, _KERNEL_ELEMENTS // (len(transform) * channels)))
    slices = taps_9OC.split_with_sizes(parts, dim=1)
    kernels = [taps_9OC.new_empty(len(transform), part, channels) for part in parts]

    def compute(index: int) -> None:
        torch.mm(transform, slices[index].flatten(1), out=kernels[index].flatten(1))

    for_each(compute, range(len(parts)))
    return kernels


def _filter(tiles: Tensor, kernels: list[Tensor], m: int) -> Tensor:
    """Transform, multiply per coefficient, transform back: [K, T·C] to [m·m, T, O]."""
    channels, out_channels = kernels[0].shape[2], sum(kernel.shape[1] for kernel in kernels)
    input_transform, _, output_transform = _transforms(m, tiles.dtype)
    x_KTC = (input_transform @ tiles).view(len(tiles), -1, channels)
    if out_channels == channels:
        y_KTO = tiles.view(x_KTC.shape)  # no longer needed, and still in the cache
    else:
        y_KTO = x_KTC.new_empty(*x_KTC.shape[:2], out_channels)
    first = 0
    for kernel_KoC in kernels:
        last = first + kernel_KoC.shape[1]
        _multiply(x_KTC, kernel_KoC, out=y_KTO[:, :, first:last])
        first = last
    return (output_transform @ y_KTO.flatten(1)).view(m * m, -1, out_channels)


def _multiply(x_KTC: Tensor, kernel_KOC: Tensor, out: Tensor) -> None:
    """One product over channels per coefficient, in fp32 by oneDNN where it is there."""
    if x_KTC.dtype != torch.float32 or not _has_onednn():
        torch.bmm(x_KTC, kernel_KOC.mT, out=out)
        return
    for y, x, kernel in zip(out, x_KTC, kernel_KOC, strict=True):
        y.copy_(torch.ops.mkldnn._linear_pointwise(x, kernel, None, "none", [], ""))


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _activate_(y: Tensor, activation: str) -> None:
    if activation == "relu":
        y.relu_()
    elif activation == "silu":
        F.silu(y, inplace=True)


@cache
def _transforms(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Bᵀ⊗Bᵀ, G⊗G and Aᵀ⊗Aᵀ for m×m tiles and 3×3 kernels (Toom-Cook over `_POINTS`)."""
    points = torch.tensor(_POINTS[m], dtype=torch.float64)
    n, infinity = m + 2, torch.zeros(1, m, dtype=torch.float64)
    infinity[0, -1] = 1
    output = torch.cat([points[:, None] ** torch.arange(m), infinity]).T  # Aᵀ: m × n
    gaps = points[:, None] - points + torch.eye(n - 1)
    powers = points[:, None] ** torch.arange(3) / gaps.prod(dim=1, keepdim=True)
    kernel = torch.cat([powers, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])  # G: n × 3
    # Bᵀ follows from the two: every output i and tap k must pick the input i + k and nothing else.
    products = (output[:, None, :] * kernel.T[None]).reshape(3 * m, n)
    picks = torch.stack([torch.eye(n)[i + k] for i in range(m) for k in range(3)]).double()
    inputs = torch.linalg.lstsq(products, picks).solution
    return tuple(torch.kron(t, t).to(dtype) for t in (inputs, kernel, output))  # type: ignore[return-value]
