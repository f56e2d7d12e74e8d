"""A made-up linear layer that behaves like one of a diffusion transformer when it is quantized.

Its inputs have correlated channels of different size, some of them outliers, and tokens of
different size; its weight has a planted low-rank part. Seeded by numpy's PCG64, drawn in the order
written here, so that numbers can be compared across implementations.

    x = token gain · channel gain · (√0.3 G + √0.7 F L)
    W = normal / √K, columns of outlier channels × 0.25, + Σ_i σ_i u_i v_iᵀ with σ = 8 … 3
"""

# M tokens   N out channels   K in channels   F factors

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

PLANTED_RANK: Final = 8
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class SyntheticLayer(NamedTuple):
    """fp32 tensors.

    Attributes:
        weight_NK: the weight.
        calibration_MK: inputs to quantize with.
        test_MK: inputs to judge with.
    """

    weight_NK: Tensor
    calibration_MK: Tensor
    test_MK: Tensor


def synthetic_layer(
    seed: int,
    *,
    rows: int = 768,
    columns: int = 768,
    calibration: int = 4096,
    test: int = 1024,
) -> SyntheticLayer:
    """Draw a layer.

    Args:
        seed: of PCG64.
        rows: N.
        columns: K, a multiple of 16.
        calibration: calibration tokens.
        test: test tokens.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    factors = columns // 16
    gain_K = np.exp(0.5 * draw.standard_normal(columns))
    outliers = draw.permutation(columns)[: max(4, columns // 128)]
    gain_K[outliers] *= draw.uniform(20, 60, len(outliers))
    loadings_FK = draw.standard_normal((factors, columns)) / np.sqrt(factors)

    def inputs(tokens: int) -> Tensor:
        token_M1 = np.exp(0.3 * draw.standard_normal((tokens, 1)))
        own_MK = draw.standard_normal((tokens, columns))
        shared_MF = draw.standard_normal((tokens, factors))
        base_MK = np.sqrt(0.3) * own_MK + np.sqrt(0.7) * (shared_MF @ loadings_FK)
        return torch.from_numpy(base_MK * token_M1 * gain_K).float()

    calibration_MK, test_MK = inputs(calibration), inputs(test)
    weight_NK = draw.standard_normal((rows, columns)) / np.sqrt(columns)
    weight_NK[:, outliers] *= 0.25
    left_NP, right_KP = (_orthonormal(draw, size) for size in (rows, columns))
    weight_NK += (left_NP * np.linspace(8, 3, PLANTED_RANK)) @ right_KP.T
    return SyntheticLayer(torch.from_numpy(weight_NK).float(), calibration_MK, test_MK)


def _orthonormal(draw: np.random.Generator, size: int) -> FloatArray:
    return np.linalg.qr(draw.standard_normal((size, PLANTED_RANK)))[0]
