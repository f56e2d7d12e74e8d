"""Residual quantizer of VILA-U's vision tower (arXiv 2409.04429, section 3.1; RQ-VAE, 2203.01941).

A vector becomes D codes, one after the other: each names the table row that is nearest to what the
rows before it have left over. Tables are not trained by gradients but follow moving averages of the
vectors that chose each row.

Axes: B batch, H and W latent grid, h and w code grid, C channels, D depth, N vectors, V table rows.
Everything is channels-last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as ranks
from torch import Generator, Tensor, nn

from gesso_core.errors import ConfigError, InvalidRequest

SMOOTHING = 1e-5  # keeps the count of a row that nobody chose above zero
TILE_NOISE = 0.01  # of repeated vectors, divided by the square root of the width


@dataclass(frozen=True)
class Quantized:
    """What quantization gives: codes, and the sums of table rows after each depth."""

    codes_BhwD: Tensor  # int64
    partial_sums: tuple[Tensor, ...]  # D tensors in the shape of the codes, (B, h, w, C)
    z_q_BHWC: Tensor  # the last sum in the shape of the latent

    def commitment_loss(self, x_BhwC: Tensor) -> Tensor:
        """Mean over depths of the mean square distance to each partial sum; gradient to x only."""
        losses = [(x_BhwC - part.detach()).square().mean() for part in self.partial_sums]
        return torch.stack(losses).mean()


class Codebook(nn.Module):
    """K rows that follow the vectors assigned to them, and a last row of zeros, never chosen."""

    table_VC: Tensor
    counts_V: Tensor
    sums_VC: Tensor

    def __init__(
        self,
        entries: int,
        width: int,
        *,
        decay: float = 0.99,
        restart: bool = True,
        restart_below: float = 1.0,
    ) -> None:
        """A table of random rows.

        Args:
            entries: K, rows that can be chosen.
            width: C.
            decay: of the moving averages.
            restart: replace rows that are hardly used by vectors of the batch.
            restart_below: averaged number of vectors per update under which a row is replaced.
        """
        super().__init__()
        self.decay, self.restart, self.restart_below = decay, restart, restart_below
        rows_VC = torch.randn(entries, width)
        self.register_buffer("table_VC", torch.cat([rows_VC, torch.zeros(1, width)]))
        self.register_buffer("counts_V", torch.zeros(entries))
        self.register_buffer("sums_VC", rows_VC.clone())

    @property
    def entries(self) -> int:
        """K: rows that can be chosen."""
        return len(self.counts_V)

    def nearest(self, x_NC: Tensor) -> Tensor:
        """Index of the row nearest to each vector, (N,) int64; always computed in float32."""
        x_NC, rows_VC = x_NC.float(), self.table_VC[:-1].float()
        with torch.autocast(x_NC.device.type, enabled=False):
            squares_V = rows_VC.square().sum(dim=1)
            return torch.addmm(squares_V, x_NC, rows_VC.T, alpha=-2).argmin(dim=1)

    def rows(self, codes: Tensor) -> Tensor:
        """Table rows of codes of any shape, (..., C); the code K gives zeros."""
        return nn.functional.embedding(codes, self.table_VC)

    @torch.no_grad()
    def update(
        self,
        x_NC: Tensor,
        codes_N: Tensor,
        *,
        permutation_N: Tensor | None = None,
        generator: Generator | None = None,
    ) -> None:
        """Let the rows follow the vectors that chose them; call it after the codes were looked up.

        Args:
            x_NC: vectors.
            codes_N: the row that each of them chose.
            permutation_N: order of the vectors from which restarted rows are taken; drawn from
                ``generator`` when it is not given.
            generator: source of that order, and of the noise of repeated vectors.
        """
        x_NC = x_NC.to(self.sums_VC.dtype)
        counts_V = torch.bincount(codes_N, minlength=self.entries).to(x_NC)
        sums_VC = torch.zeros_like(self.sums_VC).index_add_(0, codes_N, x_NC)
        if ranks.is_available() and ranks.is_initialized():
            ranks.all_reduce(counts_V)
            ranks.all_reduce(sums_VC)
        self.counts_V.lerp_(counts_V, 1 - self.decay)
        self.sums_VC.lerp_(sums_VC, 1 - self.decay)
        if self.restart:
            self._restart(self._candidates(x_NC, permutation_N, generator))
        total = self.counts_V.sum()
        smooth_V = total * (self.counts_V + SMOOTHING) / (total + self.entries * SMOOTHING)
        self.table_VC[:-1] = self.sums_VC / smooth_V[:, None]

    def _restart(self, candidates_VC: Tensor) -> None:
        unused_V = self.counts_V < self.restart_below
        self.sums_VC.copy_(torch.where(unused_V[:, None], candidates_VC, self.sums_VC))
        self.counts_V.masked_fill_(unused_V, 1.0)

    def _candidates(
        self, x_NC: Tensor, permutation_N: Tensor | None, generator: Generator | None
    ) -> Tensor:
        """One vector of the batch per row, in random order; a small batch is repeated with noise.

        Draw order: first the noise, if any, then the permutation.
        """
        if len(x_NC) < self.entries:
            x_NC = x_NC.repeat(-(-self.entries // len(x_NC)), 1)
            noise_NC = torch.rand(x_NC.shape, generator=generator).to(x_NC)
            x_NC = x_NC + noise_NC * (TILE_NOISE / x_NC.shape[1] ** 0.5)
        if permutation_N is None:
            permutation_N = torch.randperm(len(x_NC), generator=generator)
        chosen_VC = x_NC[permutation_N.to(x_NC.device)[: self.entries]].contiguous()
        if ranks.is_available() and ranks.is_initialized():
            ranks.broadcast(chosen_VC, 0)
        return chosen_VC


class ResidualQuantizer(nn.Module):
    """D codes per cell, from one shared table or one table per depth."""

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        code_shape: tuple[int, int, int],
        entries: int | Sequence[int],
        shared: bool = True,
        decay: float = 0.99,
        restart: bool = True,
        restart_below: float = 1.0,
    ) -> None:
        """An untrained quantizer.

        Args:
            latent_shape: (H, W, C).
            code_shape: (h, w, D); a cell of it gathers H/h by W/w latent cells.
            entries: K, one number or one per depth.
            shared: one table for all depths.
            decay, restart, restart_below: see `Codebook`.
        """
        super().__init__()
        height, width, channels = latent_shape
        self.code_height, self.code_width, self.depth = code_shape
        if height % self.code_height or width % self.code_width:
            raise ConfigError(
                f"a latent of {height}x{width} cannot be divided into {self.code_height}x"
                f"{self.code_width} codes; its sides must be multiples"
            )
        self.patch = (height // self.code_height, width // self.code_width)
        self.shared = shared
        sizes = [entries] * self.depth if isinstance(entries, int) else list(entries)
        if len(sizes) != self.depth or (shared and len(set(sizes)) > 1):
            raise ConfigError(
                f"table sizes {sizes} for depth {self.depth}{', one shared table' * shared}; give "
                "one number, or one per depth and a table for each"
            )
        self.width = channels * self.patch[0] * self.patch[1]
        self.codebooks = nn.ModuleList(
            Codebook(size, self.width, decay=decay, restart=restart, restart_below=restart_below)
            for size in (sizes[:1] if shared else sizes)
        )

    @property
    def tables(self) -> list[Codebook]:
        """The table of every depth; the same one D times when it is shared."""
        books = [book for book in self.codebooks if isinstance(book, Codebook)]
        return books * self.depth if self.shared else books

    def to_code_shape(self, x_BHWC: Tensor) -> Tensor:
        """Gather the latent cells of each code cell: (B, h, w, C of a code)."""
        down, across = self.patch
        batch, channels = x_BHWC.shape[0], x_BHWC.shape[-1]
        cells = x_BHWC.reshape(
            batch, self.code_height, down, self.code_width, across, channels
        ).permute(0, 1, 3, 2, 4, 5)
        return cells.reshape(batch, self.code_height, self.code_width, self.width)

    def to_latent_shape(self, x_BhwC: Tensor) -> Tensor:
        """The inverse of `to_code_shape`."""
        down, across = self.patch
        batch = x_BhwC.shape[0]
        cells = x_BhwC.reshape(batch, self.code_height, self.code_width, down, across, -1).permute(
            0, 1, 3, 2, 4, 5
        )
        return cells.reshape(batch, self.code_height * down, self.code_width * across, -1)

    @torch.no_grad()
    def encode(self, x_BHWC: Tensor) -> Quantized:
        """Codes and partial sums of a latent; the tables stay as they are."""
        return self._quantize(x_BHWC, None, None, update=False)

    @torch.no_grad()
    def update(
        self,
        x_BHWC: Tensor,
        *,
        permutations: Sequence[Tensor] | None = None,
        generator: Generator | None = None,
    ) -> Quantized:
        """`encode`, and after each depth one step of its table.

        The codes of a depth come from its table before the step. A shared table takes D steps, and
        a later depth sees those of the earlier ones.

        Args:
            x_BHWC: latent.
            permutations: see `Codebook.update`, one per depth.
            generator: see `Codebook.update`; used depth by depth.
        """
        return self._quantize(x_BHWC, permutations, generator, update=True)

    def rows(self, codes: Tensor) -> Tensor:
        """The table row of every code, (..., D) to (..., D, C)."""
        self._check_codes(codes)
        tables = self.tables
        if self.shared:
            return tables[0].rows(codes)
        parts = [table.rows(codes[..., d]) for d, table in enumerate(tables)]
        return torch.stack(parts, dim=-2)

    def embed(self, codes: Tensor) -> Tensor:
        """The sum of the rows of all depths, (..., D) to (..., C)."""
        return self.rows(codes).sum(dim=-2)

    def embed_partial(self, codes: Tensor) -> Tensor:
        """Sums of the rows up to each depth, (..., D) to (..., D, C)."""
        return self.rows(codes).cumsum(dim=-2)

    def _quantize(
        self,
        x_BHWC: Tensor,
        permutations: Sequence[Tensor] | None,
        generator: Generator | None,
        *,
        update: bool,
    ) -> Quantized:
        x_BhwC = self.to_code_shape(x_BHWC)
        left_NC = x_BhwC.reshape(-1, self.width).float()
        codes, chosen = [], []
        for d, table in enumerate(self.tables):
            codes_N = table.nearest(left_NC)
            rows_NC = table.rows(codes_N).float()
            if update:
                order = None if permutations is None else permutations[d]
                table.update(left_NC, codes_N, permutation_N=order, generator=generator)
            left_NC = left_NC - rows_NC
            codes.append(codes_N)
            chosen.append(rows_NC.view(x_BhwC.shape))
        partial_sums = tuple(part.to(x_BHWC.dtype) for part in accumulate(chosen))
        return Quantized(
            codes_BhwD=torch.stack(codes, dim=-1).view(*x_BhwC.shape[:-1], self.depth),
            partial_sums=partial_sums,
            z_q_BHWC=self.to_latent_shape(partial_sums[-1]),
        )

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] != self.depth or codes.dtype != torch.int64:
            raise InvalidRequest(
                f"codes of shape {tuple(codes.shape)} and type {codes.dtype}; this quantizer has "
                f"{self.depth} codes of type int64 per cell",
                field="codes",
            )


def straight_through(x: Tensor, z_q: Tensor) -> Tensor:
    """The value of ``z_q`` with the gradient of ``x``."""
    return x + (z_q - x).detach()
