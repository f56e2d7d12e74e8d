"""Records from the deepcompressor quantizer's state: dequantized weights with their scales.

Its files keep the weights as ordinary floating-point numbers that lie on the quantization grid, so
the codes are recovered exactly by one division. What its exporter still has to do is done here, in
float64 as there: the branch divided by λ, the bias corrected for the shift of the activations, and
the constant 1 of "1 + scale" folded into AdaLN biases.
"""

# N output channels   K input channels   G groups along K   R rank

from typing import Final

import torch
from gesso_kernels.number_formats import e2m1_codes, pack_consecutive
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.packing import interleave_rows, pad_to
from gesso_core.quant.record import GROUP, ActivationFormat, QuantizedLinear, WeightFormat

AWQ_ZERO: Final = 7  # code of the value 0
_COLUMN_TILE: Final = 64  # kernels read whole groups of 64 columns, in every format


def residual_layer(
    weight_NK: Tensor,
    scale: Tensor,
    *,
    micro_scale_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    smooth_K: Tensor | None = None,
    down_RK: Tensor | None = None,
    up_NR: Tensor | None = None,
    shift: float | None = None,
) -> QuantizedLinear:
    """A W4A4 record.

    Args:
        weight_NK: dequantized residual, in the smoothed space, 16 bit.
        scale: int4: group scales [N, G] (or [N, 1, G, 1]); nvfp4: the tensor scale, 1 or N values.
        micro_scale_NG: nvfp4: scales of groups of 16; None means int4.
        bias_N: already corrected by ``−shift·rowsum(W)`` where there is a shift; None: zero.
        smooth_K: λ; None if it was folded into the producer of the input.
        down_RK: factor that acts on the smoothed input: 1/λ is folded in here.
        up_NR: the other factor.
        shift: added to the input before quantizing; None or 0 for layers not after a GELU.
    """
    dtype = weight_NK.dtype
    weight_NK = weight_NK.flatten(1)  # a 1x1 convolution is a matrix
    rows, columns = weight_NK.shape
    weight: WeightFormat = "int4" if micro_scale_NG is None else "nvfp4"
    micro_NG = scale if micro_scale_NG is None else micro_scale_NG
    micro_NG = micro_NG.reshape(rows, -1)
    tensor_scale = None if micro_scale_NG is None else scale.flatten()
    down_RK = weight_NK.new_zeros(0, columns) if down_RK is None else down_RK.flatten(1)
    up_NR = weight_NK.new_zeros(rows, 0) if up_NR is None else up_NR.flatten(1)
    down64_RK = down_RK.double() if smooth_K is None else down_RK.double() / smooth_K.double()
    bias_N = torch.zeros(rows, dtype=dtype) if bias_N is None else bias_N
    if shift:
        moved_N = up_NR.double() @ (down64_RK @ torch.full((columns,), shift).double())
        bias_N = (bias_N.double() + moved_N).to(dtype)
    smooth_K = torch.ones(columns, dtype=dtype) if smooth_K is None else smooth_K
    codes_NK = _codes(weight_NK, micro_NG, tensor_scale)
    groups = _COLUMN_TILE // (GROUP[weight] or _COLUMN_TILE)
    stored_NG = micro_NG if weight == "int4" else micro_NG.to(torch.float8_e4m3fn)
    return QuantizedLinear(
        weight=weight,
        activation=_activation(weight, shift),
        in_features=columns,
        codes=pack_consecutive(pad_to(codes_NK, _COLUMN_TILE, 1)),
        scale=pad_to(stored_NG, groups, 1, 1),
        tensor_scale=tensor_scale,
        smooth=pad_to(smooth_K.flatten(), _COLUMN_TILE, 0, 1),
        down=pad_to(down64_RK.to(dtype), _COLUMN_TILE, 1),
        up=up_NR,
        bias=bias_N,
        shift=shift or 0.0,
    )


def weight_only_layer(
    weight_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, splits: int = 1
) -> QuantizedLinear:
    """A weight-only record of an AdaLN layer, rows in the engine's order.

    Args:
        weight_NK: dequantized weight, K a multiple of 64.
        scale_NG: group scales [N, G] or [N, 1, G, 1].
        bias_N: None: zero.
        splits: how many vectors the layer makes (3 or 6); their channels are interleaved, and the
            constant 1 of "1 + scale" is folded into the bias of the second and the last but one.
    """
    rows, columns = weight_NK.shape
    scale_NG = interleave_rows(scale_NG.reshape(rows, -1), splits)
    weight_NK = interleave_rows(weight_NK, splits)
    bias_N = torch.zeros(rows, dtype=weight_NK.dtype) if bias_N is None else bias_N
    if splits > 1:
        one_S1 = torch.zeros(splits, 1, dtype=bias_N.dtype)
        one_S1[[1, splits - 2]] = 1
        bias_N = (bias_N.view(splits, -1) + one_S1).flatten()
    return QuantizedLinear(
        weight="int4",
        activation="16bit",
        in_features=columns,
        codes=pack_consecutive((_grid(weight_NK, scale_NG) + AWQ_ZERO).clamp(0, 15).to(torch.int8)),
        scale=scale_NG,
        zero=scale_NG * -AWQ_ZERO,
        smooth=torch.ones(columns, dtype=scale_NG.dtype),
        down=scale_NG.new_zeros(0, columns),
        up=scale_NG.new_zeros(rows, 0),
        bias=interleave_rows(bias_N, splits),
    )


def int8_codes(weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """int8 codes of a dequantized 8-bit weight with one scale per row."""
    return _grid(weight_NK, scale_N.reshape(-1, 1)).clamp(-128, 127).to(torch.int8)


def require_grid(name: str, weight_NK: Tensor, layer: QuantizedLinear) -> None:
    """Raise `WeightsError` if the weights are not the grid points that the codes say.

    A mix of files from two runs shows up here: scales of one, weights of the other.
    """
    residual_NK = layer.residual()[:, : layer.in_features]
    # Stored weights are grid points rounded to 16 bit.
    bound = weight_NK.flatten(1).float().abs().amax() * 2.0**-6
    if (residual_NK - weight_NK.flatten(1).float()).abs().amax() > bound:
        raise WeightsError(
            f"the weights of {name} do not lie on the grid of their scales; model.pt and scale.pt "
            "must come from the same run"
        )


def _activation(weight: WeightFormat, shift: float | None) -> ActivationFormat:
    if weight == "nvfp4":
        return "nvfp4"
    return "uint4" if shift else "int4"


def _codes(weight_NK: Tensor, micro_NG: Tensor, tensor_scale: Tensor | None) -> Tensor:
    if tensor_scale is None:
        return _grid(weight_NK, micro_NG).clamp(-8, 7).to(torch.int8)
    scaled_NK = weight_NK.float() / tensor_scale.float().view(-1, 1)
    groups_NGk = scaled_NK.view(*micro_NG.shape, -1) / micro_NG.float()[..., None]
    return _e2m1_towards_zero(groups_NGk.flatten(1))


def _grid(weight_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """The nearest whole multiple of its scale for every weight, fp32."""
    groups_NGk = weight_NK.float().reshape(*scale_NG.shape, -1)
    return (groups_NGk / scale_NG.float()[..., None]).round().flatten(1)


def _e2m1_towards_zero(x: Tensor) -> Tensor:
    """Nearest e2m1 code, ties to the smaller magnitude, as the exporter of these files rounds."""
    index = e2m1_codes(-x.abs(), ties="up") & 7
    return torch.where((x < 0) & (index > 0), index + 8, index).to(torch.int8)
