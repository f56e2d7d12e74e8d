"""The device half that the quantizing kernels K1, K1b and K1c share.

Each of these kernels owns a block of rows for all of K, so no sum is split between programs and
results repeat bit for bit. They differ only in how a tile of the 16-bit input y comes to be; they
pass that as a function:

    TILE(source, columns) -> y [rows, columns], 0 where rows or columns do not exist

From y: the branch ``y · downᵀ`` in fp32, and codes and scales of ``h = (y + shift) / λ``.
"""

from gesso_kernels.device_functions import e2m1_encode, e4m3_decode, e4m3_encode, rne
from gesso_kernels.triton_import import tl, triton


@triton.jit  # type: ignore[untyped-decorator]
def _project(acc, y, down, columns, K, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc [rows, RANK] += y · downᵀ over these columns; ranks above ``rank`` are 0."""
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        inside = (ranks < rank)[None, :] & (columns < K)[:, None]
        tile = tl.load(down + ranks[None, :] * K + columns[:, None], inside, other=0.0)
        acc = tl.dot(y, tile, acc)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _smooth(y, smooth, columns, WIDTH, K, SHIFT: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """h = (y + SHIFT) / λ in fp32, 0 beyond WIDTH; ROUND takes both steps in the type of y.

    The product with 1/λ, once rounded to bf16, is the quotient rounded to bf16: a quotient of two
    8-bit mantissas is never nearer than 2⁻¹⁷ to a tie. For fp16 that bound is 2⁻²³, which errors
    of fp32 reach only together.
    """
    h = y.to(tl.float32)
    if SHIFT != 0.0:
        h = h + SHIFT
        if ROUND:
            h = h.to(y.dtype).to(tl.float32)
    h = h * (1.0 / tl.load(smooth + columns, columns < K, other=1.0).to(tl.float32))[None, :]
    if ROUND:
        h = h.to(y.dtype).to(tl.float32)
    if SHIFT != 0.0:
        h = tl.where((columns < WIDTH)[None, :], h, 0.0)
    return h


@triton.jit  # type: ignore[untyped-decorator]
def _groups_of_64(  # type: ignore[no-untyped-def]
    TILE: tl.constexpr, source, acc, rows, keep, smooth, down, codes, scale, M, K, width, rank,
    SHIFT: tl.constexpr, UNSIGNED: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """INT4: the two halves of a group are two tiles, so packing moves nothing between threads."""
    half = tl.arange(0, 32)
    LIMIT: tl.constexpr = 15.0 if UNSIGNED else 7.0
    LOWEST: tl.constexpr = 0.0 if UNSIGNED else -8.0
    for group in range(0, K // 64):
        low = group * 64 + half
        high = low + 32
        y_low = TILE(source, low)
        y_high = TILE(source, high)
        acc = _project(acc, y_low, down, low, K, rank, RANK)
        acc = _project(acc, y_high, down, high, K, rank, RANK)
        h_low = _smooth(y_low, smooth, low, width, K, SHIFT, True)
        h_high = _smooth(y_high, smooth, high, width, K, SHIFT, True)
        largest = tl.max(tl.maximum(tl.abs(h_low), tl.abs(h_high)), axis=1)
        s = tl.div_rn(largest, LIMIT)
        usable = s > 1.1754943508222875e-38
        factor = tl.where(usable, tl.div_rn(1.0, tl.where(usable, s, 1.0)), 0.0)[:, None]
        q_low = rne(tl.minimum(tl.maximum(h_low * factor, LOWEST), LIMIT))
        q_high = rne(tl.minimum(tl.maximum(h_high * factor, LOWEST), LIMIT))
        packed = (q_low & 15) | ((q_high & 15) << 4)
        place = codes + rows[:, None] * (K // 2) + (group * 32 + half)[None, :]
        tl.store(place, packed.to(tl.uint8), keep[:, None])
        tl.store(scale + group * M + rows, s.to(scale.dtype.element_ty), keep)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _groups_of_16(  # type: ignore[no-untyped-def]
    TILE: tl.constexpr, source, acc, rows, keep, smooth, down, codes, scale, K, width, rank,
    SHIFT: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """NVFP4: e2m1 codes with an e4m3 scale per 16 columns."""
    for start in range(0, K, 64):
        columns = start + tl.arange(0, 64)
        y = TILE(source, columns)
        acc = _project(acc, y, down, columns, K, rank, RANK)
        h = _smooth(y, smooth, columns, width, K, SHIFT, True).reshape(BLOCK_M, 4, 16)
        s = e4m3_encode(tl.div_rn(tl.max(tl.abs(h), axis=2), 6.0))
        place = scale + rows[:, None] * (K // 16) + (start // 16 + tl.arange(0, 4))[None, :]
        tl.store(place, s.to(tl.uint8), keep[:, None])
        unit = tl.where(s > 0, e4m3_decode(s), float("inf"))  # an infinite unit makes all codes 0
        q = e2m1_encode(h, unit[:, :, None])
        even, odd = q.reshape(BLOCK_M, 32, 2).split()
        place = codes + rows[:, None] * (K // 2) + (start // 2 + tl.arange(0, 32))[None, :]
        tl.store(place, (even | (odd << 4)).to(tl.uint8), keep[:, None])
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _whole_rows(  # type: ignore[no-untyped-def]
    TILE: tl.constexpr, source, acc, rows, keep, smooth, down, codes, scale, K, width, rank,
    SHIFT: tl.constexpr, FP8: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 and fp8: the largest of the row first; the second pass finds its tiles in the cache."""
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        y = TILE(source, columns)
        acc = _project(acc, y, down, columns, K, rank, RANK)
        largest = tl.maximum(largest, tl.abs(_smooth(y, smooth, columns, width, K, SHIFT, False)))
    s = tl.div_rn(tl.max(largest, axis=1), LIMIT)
    tl.store(scale + rows, s, keep)
    divisor = tl.where(s > 0.0, s, 1.0)[:, None]
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        h = _smooth(TILE(source, columns), smooth, columns, width, K, SHIFT, False)
        place = codes + rows[:, None] * K + columns[None, :]
        inside = keep[:, None] & (columns < K)[None, :]
        if FP8:
            tl.store(place, e4m3_encode(h / divisor).to(tl.uint8), inside)
        else:
            q = rne(tl.minimum(tl.maximum(h / divisor, -LIMIT), LIMIT))
            tl.store(place, q.to(tl.int8), inside)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def quantize_block(  # type: ignore[no-untyped-def]
    TILE: tl.constexpr, source, rows, keep, smooth, down, codes, scale, low_rank, M, K, width, rank,
    FORMAT: tl.constexpr, SHIFT: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Everything after the producer, for one block of rows.

    Args:
        TILE: gives y, see the module.
        source: what TILE needs.
        rows: int64 [BLOCK_M], rows of the outputs; ``keep`` says which exist.
        width: columns of y; the others up to K count as 0.
        rank: rows of ``down``; RANK is it rounded up to a power of two ≥ 16, or 0.
        FORMAT: ``"int4"``, ``"uint4"``, ``"int8"``, ``"fp8"`` or ``"nvfp4"``; e4m3 tensors come as
            uint8.
    """
    acc = tl.zeros((BLOCK_M, RANK if RANK > 0 else 16), tl.float32)
    if FORMAT == "nvfp4":
        acc = _groups_of_16(
            TILE, source, acc, rows, keep, smooth, down, codes, scale, K, width, rank,
            SHIFT, RANK, BLOCK_M,
        )  # fmt: skip
    elif FORMAT == "int4" or FORMAT == "uint4":  # noqa: PLR1714 (no sets in Triton)
        acc = _groups_of_64(
            TILE, source, acc, rows, keep, smooth, down, codes, scale, M, K, width, rank,
            SHIFT, FORMAT == "uint4", RANK,
        )  # fmt: skip
    else:
        acc = _whole_rows(
            TILE, source, acc, rows, keep, smooth, down, codes, scale, K, width, rank,
            SHIFT, FORMAT == "fp8", RANK, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        inside = keep[:, None] & (ranks < rank)[None, :]
        tl.store(low_rank + rows[:, None] * rank + ranks[None, :], acc, inside)
