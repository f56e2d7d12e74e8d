"""The two block formats in which SmolLM2's matrices are stored, and their dequantization.

A row of a matrix is a sequence of blocks of 32 weights. All numbers are little endian.

======  =====  =================================================================
format  bytes  layout
======  =====  =================================================================
Q4_1    20     fp16 scale d, fp16 minimum m, 16 bytes of nibbles; the low nibbles
               are weights 0..15, the high nibbles 16..31;  w = d·q + m
Q8_0    34     fp16 scale d, 32 signed bytes;  w = d·q
======  =====  =================================================================
"""

from typing import Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError

BLOCK_WEIGHTS: Final = 32
BLOCK_BYTES: Final[dict[str, int]] = {"q4_1": 20, "q8_0": 34}


def row_bytes(format_name: str, columns: int) -> int:
    """Bytes of one stored row of ``columns`` weights."""
    if format_name not in BLOCK_BYTES or columns % BLOCK_WEIGHTS:
        raise WeightsError(
            f"cannot store {columns} columns as {format_name!r}; formats are "
            f"{', '.join(BLOCK_BYTES)} and columns a multiple of {BLOCK_WEIGHTS}"
        )
    return columns // BLOCK_WEIGHTS * BLOCK_BYTES[format_name]


def dequantize(format_name: str, packed_RS: Tensor) -> Tensor:
    """Stored rows (R, row bytes) uint8 to float32 weights (R, columns)."""
    size = BLOCK_BYTES.get(format_name)
    if size is None or packed_RS.dtype != torch.uint8 or packed_RS.shape[-1] % size:
        raise WeightsError(
            f"a {packed_RS.dtype} tensor of shape {tuple(packed_RS.shape)} is not a whole number "
            f"of {format_name!r} blocks; download the weights again"
        )
    blocks = packed_RS.reshape(-1, size)
    weights = _q4_1(blocks) if format_name == "q4_1" else _q8_0(blocks)
    return weights.reshape(*packed_RS.shape[:-1], -1)


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).float()


def _q4_1(blocks: Tensor) -> Tensor:
    scale, minimum, nibbles = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=1).float()
    return codes * scale + minimum


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks[:, :2])
