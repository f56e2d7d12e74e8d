"""What a quantized layer keeps in memory in each mode; derived from its record once, at load.

    dequantized   weight [N, K] and bias of the dense layer that the record stands for
    reference     weight fp32 [N, K + R]: residual dequantized, beside up; smooth [K], down [K, R]
                  and bias in fp32. Larger than the dense layer: it promises exactness, not memory
    w4a16         weight4 [N, K/2] split-half, weight_scale [K/64, N];
                  from NVFP4 weight_scale e4m3 [K/16, N], alpha fp32 [1] or [N]
    w4a4_i8dot    weight4, weight_scale
    w4a8_prog     weight4, multipliers int8 [K/64, N], row_scale fp32 [N]
    w8a8_int8     weight int8 [N, K], row_scale
    w8a8_fp8      weight e4m3 [N, K], row_scale
    nvfp4         weight4 [N, K/2] consecutive, weight_scale e4m3 [N, K/16], alpha fp32 [1] or [N]

The first two cut off the padding of K. The last six also keep smooth [K], down [R, K], up [N, R]
and bias [N], and pad K to whole groups of 64, which is what the kernels count in.
"""

# N out channels   K in channels, padded   R rank

from collections.abc import Callable
from dataclasses import replace

import torch
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.expand_w4 import (
    expand_to_rows,
    nvfp4_to_fp8_rows,
    nvfp4_to_split_half,
    progressive_multipliers,
)
from gesso_kernels.modes import Mode
from gesso_kernels.number_formats import pack_split_half, unpack_consecutive
from torch import Tensor

from gesso_core.quant.exact import exact_buffers
from gesso_core.quant.record import QuantizedLinear, pad_columns

Buffers = dict[str, Tensor | None]

_KERNEL_GROUP = 64


def buffers_of(
    record: QuantizedLinear, mode: Mode, *, name: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that ``mode`` needs of a layer, on the device of the record.

    Raises:
        UnsupportedMode: the mode cannot run this layer; names one that can.
    """
    if mode == "reference":
        return exact_buffers(record, dtype)
    if mode == "dequantized":
        # The padding is cut off for good: oneDNN takes 80 times as long on rows with gaps between.
        weight = record.dense().to(dtype).contiguous()
        return _present({"weight": weight, "bias": _cast(_bias_without_shift(record), dtype)})
    record = _padded_for_kernels(record)
    buffers = _WEIGHTS[mode](record, name, dtype)
    for part in ("smooth", "down", "up", "bias"):
        buffers.setdefault(part, _cast(getattr(record, part), dtype))
    return _present(buffers)


def layer_mode(record: QuantizedLinear, mode: Mode) -> Mode:
    """``mode`` of a model as one layer follows it.

    A layer whose input stays in 16 bit has no 8- or 4-bit product: it takes the weight-only kernel,
    or the dense weight where its format has none.
    """
    if record.activation != "16bit" or mode in ("reference", "dequantized"):
        return mode
    return "dequantized" if record.weight == "int8" or record.zero is not None else "w4a16"


def _w4a16(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    bias = _cast(_bias_without_shift(record), dtype)
    if record.weight == "nvfp4":
        weight4, scale = nvfp4_to_split_half(record.codes, record.scale)
        return {
            "weight4": weight4,
            "weight_scale": scale,
            "alpha": _alpha(record),
            "bias": bias,
        }
    return {**_int4(record, name, dtype), "bias": bias}


def _w4a4(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    if record.activation not in ("int4", "uint4"):
        raise _unsupported(name, record, "w4a4_i8dot", "w8a8_int8")
    return _int4(record, name, dtype)


def _int4(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    if record.weight != "int4" or record.zero is not None:
        raise _unsupported(name, record, "a 4-bit integer mode", "dequantized")
    codes = unpack_consecutive(record.codes, signed=True)
    scale = record.scale.to(dtype).T.contiguous()
    return {"weight4": pack_split_half(codes), "weight_scale": scale}


def _w4a8(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    int4 = _int4(record, name, dtype)
    multipliers, row_scale = progressive_multipliers(*_both(int4))
    return {"weight4": int4["weight4"], "multipliers": multipliers, "row_scale": row_scale}


def _int8_rows(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    if record.weight == "int8":
        return {"weight": record.codes, "row_scale": record.scale.float().flatten()}
    if record.weight == "nvfp4":
        raise _unsupported(name, record, "w8a8_int8", "w8a8_fp8")
    weight, row_scale = expand_to_rows(*_both(_int4(record, name, dtype)), to="int8")
    return {"weight": weight, "row_scale": row_scale}


def _fp8_rows(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    if record.weight == "int8":
        raise _unsupported(name, record, "w8a8_fp8", "w8a8_int8")
    if record.weight == "nvfp4":
        weight, row_scale = nvfp4_to_fp8_rows(record.codes, record.scale, _alpha(record))
    else:
        weight, row_scale = expand_to_rows(*_both(_int4(record, name, dtype)), to="fp8")
    return {"weight": weight, "row_scale": row_scale}


def _nvfp4(record: QuantizedLinear, name: str, dtype: torch.dtype) -> Buffers:
    if record.weight != "nvfp4":
        raise _unsupported(name, record, "nvfp4", "w8a8_int8")
    return {"weight4": record.codes, "weight_scale": record.scale, "alpha": _alpha(record)}


_WEIGHTS: dict[Mode, Callable[[QuantizedLinear, str, torch.dtype], Buffers]] = {
    "w4a16": _w4a16,
    "w4a4_i8dot": _w4a4,
    "w4a8_prog": _w4a8,
    "w8a8_int8": _int8_rows,
    "w8a8_fp8": _fp8_rows,
    "nvfp4": _nvfp4,
}


def _alpha(record: QuantizedLinear) -> Tensor:
    if record.tensor_scale is None:
        return torch.ones(1, device=record.codes.device)
    return record.tensor_scale.float()


def _both(int4: Buffers) -> tuple[Tensor, Tensor]:
    weight4, scale = int4["weight4"], int4["weight_scale"]
    assert weight4 is not None
    assert scale is not None
    return weight4, scale


def _bias_without_shift(record: QuantizedLinear) -> Tensor | None:
    """The bias of a layer that reads x itself, not x + shift, before the product with R."""
    if record.shift == 0:
        return record.bias
    columns = slice(record.in_features)
    share_N = (record.residual() / record.smooth.float())[:, columns].double().sum(dim=1)
    extra_N = (record.shift * share_N).float()
    return extra_N if record.bias is None else record.bias.float() + extra_N


def _padded_for_kernels(record: QuantizedLinear) -> QuantizedLinear:
    """The same layer with K a multiple of 64; the new columns count nothing."""
    missing = -record.padded_in % _KERNEL_GROUP
    if not missing:
        return record
    per_byte = 1 if record.weight == "int8" else 2
    codes = pad_columns(record.codes, _KERNEL_GROUP // per_byte)
    scale = record.scale
    if record.weight == "nvfp4":  # a byte of zeros is the e4m3 number 0
        bytes_ = pad_columns(scale.view(torch.uint8), _KERNEL_GROUP // 16)
        scale = bytes_.view(torch.float8_e4m3fn)
    return replace(
        record,
        codes=codes,
        scale=scale,
        smooth=pad_columns(record.smooth, _KERNEL_GROUP, 1.0),
        down=pad_columns(record.down, _KERNEL_GROUP),
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _present(buffers: Buffers) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in buffers.items() if tensor is not None}


def _unsupported(name: str, record: QuantizedLinear, mode: str, best: Mode) -> UnsupportedMode:
    return UnsupportedMode(
        f"{name} has {record.weight} weights and {record.activation} inputs, which {mode} cannot "
        f"run; the best mode for it is {best!r}"
    )
