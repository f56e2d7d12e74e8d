"""Where to cut a flat word into characters: the cheapest set of columns, found exactly.

A cut costs the ink it runs through; a segment costs ``0.3 ln(width / expected)²``. Segments are
0.25 to 2.6 times as wide as expected. Dynamic programming over columns, O(columns x characters x
allowed widths), each step one numpy expression.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# w columns   n characters

Array = NDArray[np.float64]

WIDTH_WEIGHT = 0.3
NARROWEST, WIDEST = 0.25, 2.6


def cut_word(cost_w: Array, expected_n: Sequence[float], pull_nw: Array | None = None) -> list[int]:
    """The n + 1 borders of n segments, the first 0 and the last w.

    Args:
        cost_w: price of a cut just left of each column, about 0..1.
        expected_n: expected widths; scaled so that they fill the columns.
        pull_nw: extra price of cut number k (1..n-1) at each column, in row k.
    """
    columns, count = len(cost_w), len(expected_n)
    if columns < count:
        raise ValueError(f"{count} characters do not fit into {columns} columns")
    expected = np.asarray(expected_n, float) * (columns / float(np.sum(expected_n)))
    best = _best_borders(cost_w, expected, pull_nw, (NARROWEST, WIDEST))
    # Widths so uneven that no cut is allowed: drop the limits, keep the costs.
    return (
        best
        or _best_borders(cost_w, expected, pull_nw, (0.0, float("inf")))
        or _even(columns, count)
    )


def _best_borders(
    cost_w: Array, expected_n: Array, pull_nw: Array | None, limits: tuple[float, float]
) -> list[int]:
    columns, count = len(cost_w), len(expected_n)
    total = np.full((count + 1, columns + 1), np.inf)
    came = np.zeros((count + 1, columns + 1), dtype=np.int64)
    total[0, 0] = 0.0
    for number, width in enumerate(expected_n, start=1):
        low = max(1, int(np.ceil(limits[0] * width)))
        high = int(min(limits[1] * width, columns))
        if high < low:
            return []
        price = _cut_price(cost_w, pull_nw, number, count)
        for size in range(low, high + 1):
            reached = total[number - 1, : columns + 1 - size]
            value = reached + WIDTH_WEIGHT * np.log(size / width) ** 2 + price[size:]
            better = value < total[number, size:]
            total[number, size:][better] = value[better]
            came[number, size:][better] = np.flatnonzero(better)
    if not np.isfinite(total[count, columns]):
        return []
    borders = [columns]
    for number in range(count, 0, -1):
        borders.append(int(came[number, borders[-1]]))
    return borders[::-1]


def _cut_price(cost_w: Array, pull_nw: Array | None, number: int, count: int) -> Array:
    """Price of ending segment ``number`` at each border; the word's end is free."""
    price = np.zeros(len(cost_w) + 1)
    if number == count:
        return price
    price[:-1] = cost_w if pull_nw is None else cost_w + pull_nw[number]
    return price


def _even(columns: int, count: int) -> list[int]:
    return [round(columns * step / count) for step in range(count + 1)]
