"""A quantized linear layer inside a model: `SVDQuantLinear`, in place of ``Linear`` or a 1x1
convolution on tokens.

    y = Q_x((x + shift) / λ) · Rᵀ  +  (x · downᵀ) · upᵀ  +  bias

The mode decides what is kept in memory and which kernels compute this; see `device_layouts`. It is
fixed when the layer is built and never depends on the number of rows. On a CPU the numbers of a row
do not depend on it either; on a GPU the tile of a product does, and with it the order of a sum.

A LoRA that is active (`gesso_core.layers.adapters`) joins the low-rank branch: its ranks are
appended. Where the weight holds the branch, in the modes `dequantized` and `reference`, it is added
beside the layer.
"""

# M rows of x   N out channels   K in channels, padded   R rank

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Self, cast

import torch
import torch.nn.functional as F
from gesso_kernels.gemm_nvfp4 import gemm_nvfp4
from gesso_kernels.gemm_w4a4 import gemm_w4a4
from gesso_kernels.gemm_w4a8 import gemm_w4a8
from gesso_kernels.gemm_w4a16 import gemm_w4a16, gemm_w4a16_nvfp4
from gesso_kernels.gemm_w8a8 import gemm_w8a8
from gesso_kernels.modes import Mode
from gesso_kernels.modulated_norm import modulated_norm
from gesso_kernels.norm_quant_down import norm_quant_down
from gesso_kernels.quant_down import InputFormat, Quantized, quant_down
from gesso_kernels.quantized_input import MAX_RANK
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gesso_core.layers.adapters import LowRank, active_low_rank, low_rank_product
from gesso_core.layers.linear import Activation, linear
from gesso_core.quant.device_layouts import buffers_of
from gesso_core.quant.exact import exact_linear
from gesso_core.quant.record import QuantizedLinear

_NO_BRANCH: Final[LowRank] = (torch.empty(0), torch.empty(0))
# Here the branch is a part of the weight; a LoRA is added beside the layer.
_BRANCH_IN_WEIGHT: Final[tuple[Mode, ...]] = ("dequantized", "reference")


class SVDQuantLinear(nn.Module):
    """(..., in_features) → (..., out_features) from quantized weights.

    Buffers are exactly what the mode needs (`device_layouts`). Moving the module moves them;
    changing its number format leaves them as they are, for they have been rounded for good.

    Attributes:
        mode: how it computes.
        record_facts: ``weight``, ``activation``, ``in_features`` and ``shift`` of the record.
        input_format: what x is quantized to before the product; None where it is not, or where
            that is part of the reference.
        rank: R of the layer itself, without LoRAs.
        record_nbytes: bytes of the record that the layer was made from.
    """

    # Buffers; which of them exist depends on the mode.
    weight: Tensor
    weight4: Tensor
    weight_scale: Tensor
    row_scale: Tensor
    multipliers: Tensor
    alpha: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(self, record: QuantizedLinear, mode: Mode, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.in_features, self.out_features = record.in_features, record.out_features
        self.rank, self.record_nbytes = record.rank, record.nbytes
        self.input_format = _input_format(record, mode)
        names = ("weight", "activation", "in_features", "shift")
        self.record_facts: dict[str, Any] = {name: getattr(record, name) for name in names}
        for name, buffer in ({"bias": None} | buffers).items():
            self.register_buffer(name, buffer)
        self._joined_branches = WeakIdKeyDictionary()  # by the `up` of a LoRA

    @classmethod
    def from_record(
        cls,
        record: QuantizedLinear,
        mode: Mode,
        *,
        name: str = "the layer",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer of a record.

        Args:
            mode: one for which this layer and the device have a kernel; on a CPU the kernels'
                references run.
            name: what errors call the layer.
            dtype: of x and y, and of what is kept in 16 bit.

        Raises:
            UnsupportedMode: the mode cannot run this layer; names one that can.
        """
        moved: dict[str, Any] = {key: t.to(device) for key, t in record.tensors().items()}
        record = replace(record, **moved)
        return cls(record, mode, buffers_of(record, mode, name=name, dtype=dtype)).eval()

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same layer in 16 bit."""
        has_bias = int(self.bias is not None)
        return 2 * self.out_features * (self.in_features + has_bias)

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """``activation(layer(x))``; any leading dimensions."""
        extra = active_low_rank(self)
        compute = _COMPUTE[self.mode]
        if extra is None:
            return compute(self, x, self._own_branch(), activation)
        if self._can_join(extra):
            return compute(self, x, self._joined_branch(extra), activation)
        y = compute(self, x, self._own_branch(), "none") + low_rank_product(x, extra)
        return F.silu(y) if activation == "silu" else y

    def normed(
        self,
        x_BND: Tensor,
        shift_B1D: Tensor,
        scale_B1D: Tensor,
        eps: float,
        activation: Activation = "none",
    ) -> Tensor:
        """``layer(modulated_norm(x, shift, scale, eps), activation)``.

        Modes with a quantized input read x once for norm, quantizer and branch.
        """
        extra = active_low_rank(self)
        quantizes = self.input_format is not None and not self.record_facts["shift"]
        if not quantizes or not (extra is None or self._can_join(extra)):
            x_BND = modulated_norm(x_BND, shift_B1D, scale_B1D, eps)
            return self.forward(x_BND, activation)
        assert self.input_format is not None
        down, up = self._own_branch() if extra is None else self._joined_branch(extra)
        quantized = norm_quant_down(
            x_BND, shift_B1D, scale_B1D, eps, self.smooth, down, format=self.input_format
        )
        y = _PRODUCTS[self.mode](self, quantized, up, activation, x_BND.dtype)
        return y.view(*x_BND.shape[:-1], -1)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        facts = self.record_facts
        return (
            f"{self.in_features} → {self.out_features}, {facts['weight']} weights, "
            f"{facts['activation']} inputs, rank {self.rank}, {self.mode}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._joined_branches.clear()
        return self

    def _own_branch(self) -> LowRank:
        """``down`` and ``up``; empty where the weight has them."""
        if self.mode in _BRANCH_IN_WEIGHT:
            return _NO_BRANCH
        return self.down, self.up

    def _can_join(self, extra: LowRank) -> bool:
        return self.mode not in _BRANCH_IN_WEIGHT and self.rank + len(extra[0]) <= MAX_RANK

    def _joined_branch(self, extra: LowRank) -> LowRank:
        """``down`` and ``up`` with the ranks of a LoRA appended; kept while that LoRA exists."""
        extra_down, extra_up = extra
        if extra_up not in self._joined_branches:
            padded = F.pad(extra_down, (0, self.down.shape[1] - extra_down.shape[1]))
            down = torch.cat([self.down, padded.to(self.down)])
            self._joined_branches[extra_up] = (
                down,
                torch.cat([self.up, extra_up.to(self.up)], dim=1),
            )
        return cast(LowRank, self._joined_branches[extra_up])


def _input_format(record: QuantizedLinear, mode: Mode) -> InputFormat | None:
    if mode == "w4a4_i8dot":
        return "uint4" if record.activation == "uint4" else "int4"
    return _INPUT_FORMATS.get(mode)


def _dequantized(layer: SVDQuantLinear, x: Tensor, _: LowRank, activation: Activation) -> Tensor:
    return linear(x, layer.weight, layer.bias, activation)


def _reference(layer: SVDQuantLinear, x: Tensor, _: LowRank, activation: Activation) -> Tensor:
    facts = layer.record_facts
    return exact_linear(
        x,
        layer._buffers,
        format=facts["activation"],
        shift=facts["shift"],
        activation=activation,
    )


def _weight_only(
    layer: SVDQuantLinear, x: Tensor, branch: LowRank, activation: Activation
) -> Tensor:
    rows, bias = x.reshape(-1, x.shape[-1]), layer.bias
    weight = (layer.weight4, layer.weight_scale)
    if layer.record_facts["weight"] == "nvfp4":
        y = gemm_w4a16_nvfp4(
            rows, layer.smooth, *weight, layer.alpha, *branch, bias, activation=activation
        )
    else:
        y = gemm_w4a16(rows, layer.smooth, *weight, *branch, bias, activation=activation)
    return y.view(*x.shape[:-1], -1)


def _quantized_input(
    layer: SVDQuantLinear, x: Tensor, branch: LowRank, activation: Activation
) -> Tensor:
    assert layer.input_format is not None
    (down, up), rows = branch, x.reshape(-1, x.shape[-1])
    shift = layer.record_facts["shift"]
    quantized = quant_down(rows, layer.smooth, down, format=layer.input_format, shift=shift)
    y = _PRODUCTS[layer.mode](layer, quantized, up, activation, x.dtype)
    return y.view(*x.shape[:-1], -1)


def _w4a4(
    layer: SVDQuantLinear, x: Quantized, up: Tensor, activation: Activation, dtype: torch.dtype
) -> Tensor:
    return gemm_w4a4(
        x.codes, x.scale, layer.weight4, layer.weight_scale, x.low_rank_MR, up, layer.bias,
        unsigned=layer.input_format == "uint4", activation=activation, out_dtype=dtype,
    )  # fmt: skip


def _w4a8(
    layer: SVDQuantLinear, x: Quantized, up: Tensor, activation: Activation, dtype: torch.dtype
) -> Tensor:
    return gemm_w4a8(
        x.codes, x.scale, layer.weight4, layer.multipliers, layer.row_scale, x.low_rank_MR, up,
        layer.bias, activation=activation, out_dtype=dtype,
    )  # fmt: skip


def _w8a8(
    layer: SVDQuantLinear, x: Quantized, up: Tensor, activation: Activation, dtype: torch.dtype
) -> Tensor:
    return gemm_w8a8(
        x.codes, x.scale, layer.weight, layer.row_scale, x.low_rank_MR, up, layer.bias,
        activation=activation, out_dtype=dtype,
    )  # fmt: skip


def _nvfp4(
    layer: SVDQuantLinear, x: Quantized, up: Tensor, activation: Activation, dtype: torch.dtype
) -> Tensor:
    return gemm_nvfp4(
        x.codes, x.scale, layer.weight4, layer.weight_scale, layer.alpha, x.low_rank_MR, up,
        layer.bias, activation=activation, out_dtype=dtype,
    )  # fmt: skip


Product = Callable[[SVDQuantLinear, Quantized, Tensor, Activation, torch.dtype], Tensor]
Compute = Callable[[SVDQuantLinear, Tensor, LowRank, Activation], Tensor]

_INPUT_FORMATS: Final[dict[Mode, InputFormat]] = {
    "w4a8_prog": "int8",
    "w8a8_int8": "int8",
    "w8a8_fp8": "fp8",
    "nvfp4": "nvfp4",
}
_PRODUCTS: Final[dict[Mode, Product]] = {
    "w4a4_i8dot": _w4a4,
    "w4a8_prog": _w4a8,
    "w8a8_int8": _w8a8,
    "w8a8_fp8": _w8a8,
    "nvfp4": _nvfp4,
}
_COMPUTE: Final[dict[Mode, Compute]] = {
    "dequantized": _dequantized,
    "reference": _reference,
    "w4a16": _weight_only,
    **dict.fromkeys(_PRODUCTS, _quantized_input),
}
