"""Drawing visual tokens: the inner loop over depths, and the step to the next position.

Conditional and unconditional prompts are rows of the language model of their own; they meet in the
depth transformer's logits only, and both go on with the codes that were chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gesso_core.models.vila_u.code_sampling import guided
from gesso_core.models.vila_u.depth_transformer import DepthTransformer
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.residual_quantizer import Codebook
from gesso_core.models.vila_u.rows import RowCache, padded_rows, spare_rows

# B drawings   R rows of the networks   S width of the states   D codes of a position   K codes
CPU = torch.device("cpu")


class Choose(Protocol):
    """Picks the code of depth d for every drawing from its guided logits."""

    def __call__(self, logits_BK: Tensor, depth: int) -> Tensor:
        """(B, K) → (B,) int64."""
        ...


@dataclass(frozen=True)
class Rows:
    """Which rows belong to which drawing: the conditional ones first, then the unconditional."""

    pairs: tuple[tuple[int, int], ...]
    device: torch.device

    @classmethod
    def of(cls, guided_drawings: Sequence[bool], device: torch.device = CPU) -> "Rows":
        """Drawings without guidance have one row only."""
        pairs, extra = [], len(guided_drawings)
        for number, has_guidance in enumerate(guided_drawings):
            pairs.append((number, extra if has_guidance else number))
            extra += has_guidance
        return cls(tuple(pairs), device)

    @cached_property
    def conditional(self) -> Tensor:
        """The conditional row of every drawing, (B,)."""
        return torch.tensor([c for c, _ in self.pairs], device=self.device)

    @cached_property
    def unconditional(self) -> Tensor:
        """Its unconditional row, (B,), or again the conditional one where it has none."""
        return torch.tensor([u for _, u in self.pairs], device=self.device)

    @cached_property
    def owners(self) -> Tensor:
        """The drawing of every row, (R,), the last row repeated for the spare ones."""
        owners = [*range(len(self.pairs)), *(b for b, (c, u) in enumerate(self.pairs) if c != u)]
        owners += [owners[-1]] * spare_rows(len(owners))
        return torch.tensor(owners, device=self.device)


def draw_codes(
    depth_transformer: DepthTransformer,
    tables: Sequence[Codebook],
    states_RS: Tensor,
    rows: Rows,
    scales_B: Tensor,
    choose: Choose,
) -> Tensor:
    """The D codes (B, D) of one position of every drawing.

    Args:
        depth_transformer: with a cache, so that every depth costs one position.
        tables: the codebook of every depth.
        states_RS: states of the language model, in the order of ``rows``.
        rows: which of them is conditional and which unconditional.
        scales_B: guidance scales.
        choose: argmax, or a draw.
    """
    logits_RK, cache = depth_transformer.begin(padded_rows(states_RS))
    codes: list[Tensor] = []
    sum_BC: Tensor | None = None
    for depth, table in enumerate(tables):
        codes.append(
            choose(guided(logits_RK, rows.conditional, rows.unconditional, scales_B), depth)
        )
        if depth + 1 < len(tables):
            chosen_BC = table.rows(codes[-1]).to(states_RS.dtype)
            sum_BC = chosen_BC if sum_BC is None else sum_BC + chosen_BC
            logits_RK = depth_transformer.extend(sum_BC[rows.owners], cache)
    return torch.stack(codes, dim=-1)


def next_states(
    model: VilaU,
    codes_BD: Tensor,
    rows: Rows,
    caches: Sequence[RowCache],
    lengths: Sequence[int],
) -> Tensor:
    """States (R, S) behind the codes that were just drawn, the same codes for both of a pair."""
    embeddings_RS = model.embed_codes(codes_BD[rows.owners])[: len(caches)]
    return model.rows(embeddings_RS[:, None], caches, lengths)[:, 0]
