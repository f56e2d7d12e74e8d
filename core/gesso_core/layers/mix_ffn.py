"""Mix-FFN: a gated feed-forward network with a depthwise 3x3 convolution in its middle.

Source: Sana (arXiv 2410.10629) section 2.2. The convolution tells tokens where their neighbours
are, which is why the smaller models need no position table.
"""

import torch
import torch.nn.functional as F
from gesso_kernels.depthwise_glu import depthwise_glu
from torch import Tensor, nn

from gesso_core.layers.adapters import active_low_rank, low_rank_product
from gesso_core.layers.linear import PointwiseConv, linear
from gesso_core.layers.modulation import Modulation, modulated


class MixFFN(nn.Module):
    """expand 1x1 → SiLU → depthwise 3x3 → a·SiLU(gate) → project 1x1.

    Tokens stay channels-last throughout, so both 1x1 convolutions are plain matrix products.

    ``chunks`` splits the hidden channels: since the middle convolution is depthwise, each part can
    be finished on its own and the projections added up. Memory falls by that factor; the result is
    the same up to the order of a sum. Quantized layers have no weights to split, and work whole.
    """

    def __init__(self, width: int, hidden: int, width_out: int | None = None) -> None:
        super().__init__()
        self.chunks = 1
        self.expand = PointwiseConv(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = PointwiseConv(hidden, width_out or width, bias=False)

    def forward(
        self, x_BND: Tensor, height: int, width: int, modulation: Modulation | None = None
    ) -> Tensor:
        """(B, h·w, D) row-major → (B, h·w, D); ``modulation`` is applied to x first."""
        grid = (height, width)
        if self.chunks > 1 and self._is_dense():
            return self._in_chunks(x_BND if modulation is None else modulation(x_BND), grid)
        # The expanded tensor has no name here, so that it is gone before the gate is applied.
        gated_BNC = depthwise_glu(
            modulated(self.expand, x_BND, modulation, "silu"),
            self.depthwise.weight,
            self.depthwise.bias,
            grid,
        )
        out_BND: Tensor = self.project(gated_BNC)
        return out_BND

    def _is_dense(self) -> bool:
        layers: tuple[nn.Module, ...] = (self.expand, self.project)
        return all(isinstance(layer, PointwiseConv) for layer in layers)

    def _in_chunks(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        project = self.project.weight.flatten(1)
        out_BND = x_BND.new_zeros(*x_BND.shape[:-1], project.shape[0])
        for values in torch.arange(project.shape[1], device=x_BND.device).chunk(self.chunks):
            channels = torch.cat([values, values + project.shape[1]])  # the values and their gates
            gated_BNC = depthwise_glu(
                self._expanded(x_BND, channels), *_some(self.depthwise, channels), grid
            )
            out_BND = out_BND + linear(gated_BNC, project[:, values])
            if (low_rank := active_low_rank(self.project)) is not None:
                down_RC, up_DR = low_rank
                out_BND = out_BND + low_rank_product(gated_BNC, (down_RC[:, values], up_DR))
        return out_BND

    def _expanded(self, x_BND: Tensor, channels: Tensor) -> Tensor:
        """Some channels of the expansion, activated."""
        weight, bias = _some(self.expand, channels)
        low_rank = active_low_rank(self.expand)
        if low_rank is None:
            return linear(x_BND, weight, bias, "silu")
        down_RD, up_CR = low_rank
        y_BNC = linear(x_BND, weight, bias) + low_rank_product(x_BND, (down_RD, up_CR[channels]))
        return F.silu(y_BNC)


def _some(conv: PointwiseConv | nn.Conv2d, channels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (a matrix for 1x1 convolutions) and bias of some output channels."""
    weight = conv.weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return (weight.flatten(1) if isinstance(conv, PointwiseConv) else weight), bias
