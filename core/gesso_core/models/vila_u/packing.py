"""Packing: several short rows in one long one, so that little of a batch is padding.

Rows are sorted by length and joined greedily up to a capacity. Positions start anew in each, and no
row sees its neighbours: the attention is block-diagonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gesso_core.errors import ConfigError
from gesso_core.models.vila_u.splice import IGNORED, TEXT, Batch, Row

# B packed rows   L capacity   D codes of a position
PADDING_POSITION = -1


def pack_rows(rows: Sequence[Row], capacity: int | None = None) -> Batch:
    """Pack rows into as few of ``capacity`` tokens as the greedy order gives.

    Args:
        rows: spliced rows.
        capacity: tokens of a packed row; by default those of the longest row.

    Raises:
        ConfigError: a row is longer than the capacity.
    """
    ordered = sorted(rows, key=len, reverse=True)  # stable: equal lengths keep their order
    room = len(ordered[0]) if capacity is None else capacity
    if len(ordered[0]) > room:
        raise ConfigError(
            f"a row of {len(ordered[0])} tokens does not fit into {room}; raise the capacity"
        )
    groups: list[list[Row]] = [[]]
    used = 0
    for row in ordered:
        if used + len(row) > room:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += len(row)
    return _batch(groups, max(sum(len(row) for row in group) for group in groups))


def block_diagonal_mask(segments_BL: Tensor) -> Tensor:
    """(B, 1, L, L) bool: which earlier tokens a token sees, itself included; padding, too."""
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    length = segments_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    return (same_BLL & causal_LL)[:, None]


def _batch(groups: Sequence[Sequence[Row]], length: int) -> Batch:
    depth = groups[0][0].codes_LD.shape[1]
    count = len(groups)
    ids_BL = torch.zeros(count, length, dtype=torch.int64)
    codes_BLD = torch.full((count, length, depth), TEXT, dtype=torch.int64)
    labels_BLD = torch.full((count, length, depth), IGNORED, dtype=torch.int64)
    positions_BL = torch.full((count, length), PADDING_POSITION, dtype=torch.int64)
    segments_BL = torch.zeros(count, length, dtype=torch.int64)
    for b, group in enumerate(groups):
        start = 0
        for number, row in enumerate(group):
            place = slice(start, start + len(row))
            ids_BL[b, place] = row.ids_L
            codes_BLD[b, place] = row.codes_LD
            labels_BLD[b, place] = row.labels_LD
            positions_BL[b, place] = torch.arange(len(row))
            segments_BL[b, place] = number + 1
            start += len(row)
    return Batch(
        ids_BL=ids_BL,
        codes_BLD=codes_BLD,
        labels_BLD=labels_BLD,
        mask_BL=segments_BL > 0,
        positions_BL=positions_BL,
        segments_BL=segments_BL,
    )
