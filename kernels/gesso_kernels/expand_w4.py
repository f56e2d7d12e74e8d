"""Once, when a file is loaded: 4-bit residuals in the form that a mode's kernel reads.

    to rows          w = code · scale ;  t[n] = max_k |w| / Q ;  w8 = round(w / t)   (Q 127, 448)
    progressive      t[n] = max_g scale / 17 ;  g8 = clamp(round(scale / t), 1, 17)
    split half       the e2m1 codes of an NVFP4 file in the byte order of the INT4 kernels

Rounding is half to even. A row of zeros has the scale 0 and codes 0. Plain torch on any device.
"""

# N rows of the weight   K columns   G groups of 64 (INT4) or 16 (NVFP4) columns

from typing import Final, Literal

import torch
from torch import Tensor

from gesso_kernels.number_formats import (
    E4M3_MAX,
    INT8_MAX,
    SPLIT_HALF_GROUP,
    e2m1_values,
    pack_split_half,
    to_e4m3,
    unpack_consecutive,
    unpack_split_half,
)

# 17 · 7 = 119 is the largest multiplier whose products with −7..7 stay int8.
MULTIPLIER_MAX: Final = 17
# A row that uses the code −8 needs 16 · −8 = −128.
_MULTIPLIER_MAX_WITH_8: Final = 16


def expand_to_rows(
    weight4: Tensor, weight_scale: Tensor, to: Literal["int8", "fp8"]
) -> tuple[Tensor, Tensor]:
    """INT4 groups to 8 bit with one scale per row.

    Args:
        weight4: uint8 [N, K/2], split-half codes −8..7.
        weight_scale: 16 bit [K/64, N].
        to: ``"int8"`` or ``"fp8"`` (e4m3).

    Returns:
        Weight [N, K] and row scale fp32 [N].
    """
    codes_NGC = _grouped_codes(weight4, weight_scale)
    w_NK = (codes_NGC.float() * weight_scale.T.float()[..., None]).flatten(1)
    return _rows(w_NK, to)


def nvfp4_to_fp8_rows(codes: Tensor, weight_scale: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 to e4m3 with one scale per row.

    Args:
        codes: uint8 [N, K/2], consecutive e2m1.
        weight_scale: e4m3 [N, K/16].
        alpha: fp32 second scale, [1] or [N].

    Returns:
        Weight e4m3 [N, K] and row scale fp32 [N], which includes ``alpha``.
    """
    values = e2m1_values(unpack_consecutive(codes, signed=False))
    values_NGC = values.view(*weight_scale.shape, -1) * weight_scale.float()[..., None]
    weight_NK, row_scale_N = _rows(values_NGC.flatten(1), "fp8")
    return weight_NK, row_scale_N * alpha.float()


def _rows(w_NK: Tensor, to: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    row_scale_N = w_NK.abs().amax(dim=1) / (INT8_MAX if to == "int8" else E4M3_MAX)
    divisor_N1 = torch.where(row_scale_N > 0, row_scale_N, 1.0)[:, None]
    scaled_NK = w_NK / divisor_N1
    if to == "int8":
        return scaled_NK.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), row_scale_N
    return to_e4m3(scaled_NK), row_scale_N


def progressive_multipliers(weight4: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The group scales of an INT4 weight as int8 multipliers of one scale per row.

    Groups without a nonzero code do not count for the row's scale. Rows with the code −8, which
    other quantizers produce, use multipliers up to 16.

    Args:
        weight4: uint8 [N, K/2], split-half codes −8..7.
        weight_scale: 16 bit [K/64, N].

    Returns:
        Multipliers int8 [K/64, N], 1..17, and row scale fp32 [N].
    """
    codes_NGC = _grouped_codes(weight4, weight_scale)
    used_NG = (codes_NGC != 0).any(dim=-1)
    scale_NG = torch.where(used_NG, weight_scale.T.float(), 0.0)
    has_8_N = (codes_NGC == -8).flatten(1).any(dim=1)
    largest_N = torch.where(has_8_N, _MULTIPLIER_MAX_WITH_8, MULTIPLIER_MAX).float()
    row_scale_N = scale_NG.amax(dim=1) / largest_N
    divisor_N = torch.where(row_scale_N > 0, row_scale_N, 1.0)
    multipliers_NG = (scale_NG / divisor_N[:, None]).round().clamp(min=1)
    multipliers_NG = torch.minimum(multipliers_NG, largest_N[:, None])
    return multipliers_NG.to(torch.int8).T.contiguous(), row_scale_N


def nvfp4_to_split_half(codes: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """An NVFP4 weight for `gemm_w4a16_nvfp4`: K padded with zeros to a multiple of 64.

    Args:
        codes: uint8 [N, K/2], consecutive e2m1.
        weight_scale: e4m3 [N, K/16].

    Returns:
        Codes uint8 [N, K/2] in split-half order and scales e4m3 [K/16, N].
    """
    missing = -2 * codes.shape[1] % SPLIT_HALF_GROUP
    values = unpack_consecutive(codes, signed=False)
    padded = torch.nn.functional.pad(values, (0, missing))
    scale_bytes = torch.nn.functional.pad(weight_scale.view(torch.uint8), (0, missing // 16))
    return pack_split_half(padded), scale_bytes.T.contiguous().view(weight_scale.dtype)


def _grouped_codes(weight4: Tensor, weight_scale: Tensor) -> Tensor:
    rows, groups = weight4.shape[0], 2 * weight4.shape[1] // SPLIT_HALF_GROUP
    if weight_scale.shape != (groups, rows) or 2 * weight4.shape[1] % SPLIT_HALF_GROUP:
        raise ValueError(
            f"weight_scale has the shape {tuple(weight_scale.shape)}, expected one scale per "
            f"{SPLIT_HALF_GROUP} columns of the codes {tuple(weight4.shape)}: {(groups, rows)}"
        )
    return unpack_split_half(weight4, signed=True).view(rows, groups, SPLIT_HALF_GROUP)
