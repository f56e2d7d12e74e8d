"""Quantize one linear layer from samples of its input.

    options = QuantOptions(weight="int4", activation="int4")
    layer, report = quantize_linear(weight_NK, bias_N, x_samples_MK, options)

Order of work: λ by search, the low-rank branch, the rounding of the residual; then the error on
input rows that none of these saw. Linears that read the same input (q, k, v) are one call with
their rows concatenated: they share λ and ``down``. A 1×1 convolution is given as its [N, K] matrix.
"""

# M tokens   N out channels   K in channels   R rank

import time
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest, NumericalError
from gesso_core.quant.layer_calibration import (
    CalibratedLinear,
    Evaluate,
    Objective,
    calibrate_linear,
)
from gesso_core.quant.options import LayerReport, QuantOptions
from gesso_core.quant.quantizers import fake_quantize_input, fake_quantize_weight
from gesso_core.quant.record import QuantizedLinear, pad_columns
from gesso_core.quant.shift import branch_bias, shifted_bias

__all__ = ["Evaluate", "LayerReport", "QuantOptions", "quantize_linear"]

# The kernels walk K in steps of 64, whatever the group of the format.
K_MULTIPLE: Final = 64
FEWEST_ROWS: Final = 16
_HELD_OUT_SHARE: Final = 8
_MOST_HELD_OUT: Final = 1024


def quantize_linear(
    weight_NK: Tensor,
    bias_N: Tensor | None,
    x_samples_MK: Tensor,
    options: QuantOptions,
    *,
    evaluate: Evaluate | None = None,
    shift: float = 0.0,
    sequence: int = 1,
    parts: tuple[int, ...] = (),
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantize a layer; the same arguments give the same bits.

    Args:
        weight_NK: any floating-point type.
        bias_N: or None.
        x_samples_MK: inputs of the layer, unshifted. The caller bounds their number: a few thousand
            rows from all denoising steps; one in eight is held out for the report.
        options: the recipe.
        evaluate: where candidates are judged, instead of at the linear: takes outputs [m, N] and
            the numbers of their rows [m], whole sequences in a row; e.g. to the attention output.
        shift: added to x before its quantizer, `GELU_SHIFT` behind a GELU; see `shift`.
        sequence: rows that belong together, for ``evaluate``; M is a multiple of it.
        parts: rows of each concatenated linear; gives each its own nvfp4 tensor scale.

    Returns:
        The layer on the CPU, and how well it did.

    Raises:
        InvalidRequest: shapes that do not fit, too few samples, rank too high, negative inputs for
            unsigned codes.
        NumericalError: NaN or infinity in weight or samples.
    """
    started = time.perf_counter()
    _require_usable(weight_NK, bias_N, x_samples_MK, options, sequence, parts)
    weight = pad_columns(weight_NK.float(), K_MULTIPLE).contiguous()
    bias = None if bias_N is None and not shift else shifted_bias(weight, bias_N, shift)
    x_MK = pad_columns(x_samples_MK.float() + shift, K_MULTIPLE)
    _require_non_negative(x_MK, options, shift)
    generator = torch.Generator().manual_seed(options.seed)
    rows = _split_rows(x_MK.shape[0], sequence, options.search_rows, generator)
    made = calibrate_linear(
        weight,
        x_MK[rows.calibration],
        options,
        Objective(weight, bias, x_MK, rows.search, evaluate),
        generator,
        parts=parts,
    )
    error, naive_error = _errors(made, weight, x_MK[rows.held_out], options, shift)
    report = LayerReport(
        error=error,
        naive_error=naive_error,
        alpha=made.exponents[0],
        beta=made.exponents[1],
        iterations=made.iterations,
        rank=options.rank,
        rows=x_MK.shape[0],
        seconds=time.perf_counter() - started,
    )
    return _record(made, bias, weight_NK.shape[1], options, shift), report


class _Rows(NamedTuple):
    calibration: Tensor
    search: Tensor
    held_out: Tensor


def _split_rows(rows: int, sequence: int, search: int, generator: torch.Generator) -> _Rows:
    """Whole sequences, drawn at random; the search uses a part of the calibration rows."""
    blocks = rows // sequence
    held_out = max(1, min(blocks // _HELD_OUT_SHARE, -(-_MOST_HELD_OUT // sequence)))
    searched = max(1, -(-search // sequence))
    order = torch.randperm(blocks, generator=generator)

    def members(chosen: Tensor) -> Tensor:
        starts = chosen.sort().values * sequence
        return (starts[:, None] + torch.arange(sequence)).flatten()

    rest = order[held_out:]
    return _Rows(members(rest), members(rest[:searched]), members(order[:held_out]))


def _errors(
    made: CalibratedLinear, weight_NK: Tensor, x_MK: Tensor, options: QuantOptions, shift: float
) -> tuple[float, float]:
    """Relative errors of the output without its bias: of the layer, and of plain rounding."""
    exact_MN = x_MK @ weight_NK.mT
    size = (exact_MN - shift * weight_NK.sum(1)).norm().clamp(min=torch.finfo(torch.float32).tiny)
    plain_NK = fake_quantize_weight(weight_NK, options.weight, options.dtype)
    plain_MN = fake_quantize_input(x_MK, options.activation) @ plain_NK.mT
    return (
        float((made(x_MK) - exact_MN).norm() / size),
        float((plain_MN - exact_MN).norm() / size),
    )


def _record(
    made: CalibratedLinear,
    bias_N: Tensor | None,
    in_features: int,
    options: QuantOptions,
    shift: float,
) -> QuantizedLinear:
    dtype = options.dtype
    down_RK = (made.branch.down_RK / made.smooth_K).to(dtype)
    up_NR = made.branch.up_NR.to(dtype)
    if bias_N is not None and shift:
        bias_N = branch_bias(bias_N, up_NR, down_RK, shift)
    tensor_scale = made.grid.tensor_scale
    return QuantizedLinear(
        weight=options.weight,
        activation=options.activation,
        in_features=in_features,
        codes=made.grid.codes(made.levels_NK).cpu(),
        scale=made.grid.scale.cpu(),
        tensor_scale=None if tensor_scale is None else tensor_scale.cpu(),
        smooth=made.smooth_K.to(dtype).cpu(),
        down=down_RK.cpu(),
        up=up_NR.cpu(),
        bias=None if bias_N is None else bias_N.to(dtype).cpu(),
        shift=shift,
    )


def _require_usable(
    weight_NK: Tensor,
    bias_N: Tensor | None,
    x_MK: Tensor,
    options: QuantOptions,
    sequence: int,
    parts: tuple[int, ...],
) -> None:
    if weight_NK.ndim != 2 or x_MK.ndim != 2 or x_MK.shape[1] != weight_NK.shape[1]:
        raise InvalidRequest(
            f"a weight {tuple(weight_NK.shape)} and input samples {tuple(x_MK.shape)} do not fit; "
            "give [N, K] and [M, K] (a 1×1 convolution as its matrix, tokens in rows)"
        )
    rows, columns = weight_NK.shape
    if bias_N is not None and bias_N.shape != (rows,):
        raise InvalidRequest(f"the bias is {tuple(bias_N.shape)}, expected ({rows},)")
    if parts and sum(parts) != rows:
        raise InvalidRequest(f"parts {parts} do not add up to the {rows} rows of the weight")
    if options.rank > min(rows, columns):
        raise InvalidRequest(
            f"rank {options.rank} is more than a {rows} × {columns} layer has; "
            f"give at most {min(rows, columns)}, or leave the layer in 16 bit"
        )
    _require_samples(x_MK, columns, options, sequence)
    for name, tensor in {"weight": weight_NK, "bias": bias_N, "input samples": x_MK}.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise NumericalError(
                f"the {name} of a layer contain NaN or infinity; check the checkpoint, and capture "
                "the inputs with a wider type (bfloat16 instead of float16)"
            )


def _require_samples(x_MK: Tensor, columns: int, options: QuantOptions, sequence: int) -> None:
    rows = x_MK.shape[0]
    fewest = max(FEWEST_ROWS, 2 * sequence, columns if options.gptq else 0)
    if rows < fewest or rows % sequence:
        reason = " with GPTQ (better five per column)" if options.gptq else ""
        raise InvalidRequest(
            f"{rows} rows of calibration input for a layer of {columns} columns; give at least "
            f"{fewest}{reason}, in whole sequences of {sequence}: calibrate with more prompts or "
            "more steps"
        )


def _require_non_negative(x_MK: Tensor, options: QuantOptions, shift: float) -> None:
    if options.activation == "uint4" and float(x_MK.min()) < 0:
        raise InvalidRequest(
            f"unsigned codes need inputs of at least {-shift:g}, the samples go down to "
            f"{float(x_MK.min()) - shift:g}; use activation='int4', or shift the output of a GELU"
        )
