"""Where to cut a flat word into characters: the cheapest set of columns, found exactly.

A cut costs the ink it runs through; a segment costs ``0.3 ln(width / expected)²``. Segments are
0.25 to 2.6 times as wide as expected, so that the widths tried for all characters together are
2.35 times the columns: dynamic programming takes O(columns²), however long the text is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gesso_core.annotate.geometry import Floats

# w columns   n characters


WIDTH_WEIGHT = 0.3
NARROWEST, WIDEST = 0.25, 2.6
AT_ONCE = 64  # widths tried in one step, which bounds the memory


def cut_word(
    cost_w: Floats, expected_n: Sequence[float], pull_nw: Floats | None = None
) -> list[int]:
    """The n + 1 borders of n segments, the first 0 and the last w.

    Args:
        cost_w: price of a cut just left of each column, about 0..1.
        expected_n: expected widths; scaled so that they fill the columns.
        pull_nw: extra price of cut number k (1..n-1) at each column, in row k.
    """
    columns, count = len(cost_w), len(expected_n)
    if columns < count:
        raise ValueError(f"{count} characters do not fit into {columns} columns")
    total = np.full(columns + 1, np.inf)  # of the cheapest way to end a segment at each border
    total[0] = 0.0
    sizes = np.zeros((count, columns + 1), dtype=np.int32)  # of the segment that ends there
    for number, width in enumerate(_filling(expected_n, columns)):
        total, sizes[number] = _next_segment(total, width)
        if number + 1 < count:  # the word's end is free
            total[:-1] += cost_w if pull_nw is None else cost_w + pull_nw[number + 1]
    borders = [columns]
    for size_w in sizes[::-1]:
        borders.append(borders[-1] - int(size_w[borders[-1]]))
    return borders[::-1]


def _filling(expected_n: Sequence[float], columns: int) -> Floats:
    """The widths scaled to the columns, each at least one: some way of cutting is then allowed."""
    share_n = np.asarray(expected_n, float) / float(np.sum(expected_n))
    filling_n: Floats = share_n * columns
    return filling_n if filling_n.min() >= 1 else 1 + share_n * (columns - len(share_n))


def _next_segment(total: Floats, width: float) -> tuple[Floats, NDArray[np.int32]]:
    """Cheapest total with one more segment up to each border, and that segment's size."""
    borders = len(total)
    low = max(1, int(np.ceil(NARROWEST * width)))
    high = int(min(WIDEST * width, borders - 1))
    before = np.concatenate([np.full(high, np.inf), total])
    best, best_size = np.full(borders, np.inf), np.zeros(borders, dtype=np.int32)
    for first in range(low, high + 1, AT_ONCE):
        tried = np.arange(first, min(first + AT_ONCE, high + 1))
        # Row b has the totals that many columns before border b, for each size tried.
        start = high - int(tried[-1])
        reached = sliding_window_view(before, len(tried))[start : start + borders, ::-1]
        price = reached + WIDTH_WEIGHT * np.log(tried / width) ** 2
        place = price.argmin(axis=1)
        cheapest = price[np.arange(borders), place]
        better = cheapest < best
        best[better], best_size[better] = cheapest[better], tried[place[better]]
    return best, best_size
