"""Mix-FFN: a gated feed-forward network with a depthwise 3x3 convolution in its middle.

Source: Sana (arXiv 2410.10629) section 2.2. The convolution tells tokens where their neighbours
are, which is why the smaller models need no position table.
"""

import torch
import torch.nn.functional as F
from gesso_kernels.gated_silu import gated_silu
from torch import Tensor, nn

from gesso_core.layers.linear import PointwiseConv, linear


class MixFFN(nn.Module):
    """expand 1x1 → SiLU → depthwise 3x3 → a·SiLU(gate) → project 1x1.

    Tokens stay channels-last throughout, so both 1x1 convolutions are plain matrix products.

    ``chunks`` splits the hidden channels: since the middle convolution is depthwise, each part can
    be finished on its own and the projections added up. Memory falls by that factor; the result is
    the same up to the order of a sum.
    """

    def __init__(self, width: int, hidden: int, width_out: int | None = None) -> None:
        super().__init__()
        self.chunks = 1
        self.expand = PointwiseConv(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = PointwiseConv(hidden, width_out or width, bias=False)

    def forward(self, x_BND: Tensor, height: int, width: int) -> Tensor:
        """(B, h·w, D) row-major → (B, h·w, D)."""
        grid = (height, width)
        if self.chunks > 1:
            return self._in_chunks(x_BND, grid)
        # The expanded tensor has no name here, so that it is gone before the gate is applied.
        mixed_BNC = _depthwise(
            self.expand(x_BND, "silu"), grid, self.depthwise.weight, self.depthwise.bias
        )
        out_BND: Tensor = self.project(gated_silu(mixed_BNC, dim=-1))
        return out_BND

    def _in_chunks(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        project = self.project.weight.flatten(1)
        out_BND = x_BND.new_zeros(*x_BND.shape[:-1], project.shape[0])
        for values in torch.arange(project.shape[1], device=x_BND.device).chunk(self.chunks):
            channels = torch.cat([values, values + project.shape[1]])  # the values and their gates
            mixed_BNC = _depthwise(
                linear(x_BND, *_some(self.expand, channels), "silu"),
                grid,
                *_some(self.depthwise, channels),
            )
            out_BND = out_BND + linear(gated_silu(mixed_BNC, dim=-1), project[:, values])
        return out_BND


def _some(conv: PointwiseConv | nn.Conv2d, channels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (a matrix for 1x1 convolutions) and bias of some output channels."""
    weight = conv.weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return (weight.flatten(1) if isinstance(conv, PointwiseConv) else weight), bias


def _depthwise(x_BNC: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, channels = x_BNC.shape
    x_BCHW = x_BNC.view(batch, *grid, channels).permute(0, 3, 1, 2)  # channels-last
    y_BCHW = F.conv2d(x_BCHW, weight, bias, padding=1, groups=channels)
    return y_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
