"""The multi-scale residual quantizer of HART's tokenizer (arXiv 2410.10812, section 3.1; VAR,
arXiv 2404.02905, algorithms 1 and 2).

A latent is explained scale by scale with one codebook: each scale codes what is left of it, and
adds its codes, enlarged and passed through a light convolution φ. Three rules for the last scale
exist side by side and are kept apart:

    encode, quantize, decode(phi_at_last=True)       φ at every scale
    encode_hybrid, decode(phi_at_last=False)         no φ at the last scale

What `encode_hybrid` leaves over at the last scale, less the code drawn there, is the continuous
residual that the residual diffusion of HART draws. Everything is computed in float32.
"""

# B batch   C channels   H side of the latent, equal to the last scale   p side of a scale
# N = p·p tokens, row-major   S scales   V codes   R rows of any origin

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.layers.tables import normal_table

NO_PHI = 1e-6  # ratios up to this one turn φ into the identity
ROWS_AT_ONCE = 8192  # rows of the distance matrix that are held in memory
USED_SHARE = 0.08  # of an even share of hits, from which a code counts as used


class HybridCodes(NamedTuple):
    """A latent as tokens and what they leave over."""

    indices: list[Tensor]  # per scale (B, p·p), int64
    rest_BNC: Tensor  # at the last scale, before its own code is subtracted


class Quantized(NamedTuple):
    """A latent after the training forward."""

    latent_BCHW: Tensor  # gradients pass straight through to the input
    vq_loss: Tensor
    indices: list[Tensor]  # per scale (B, p·p), int64
    used_share: Tensor  # of the codebook, in this batch


class MultiScaleQuantizer(nn.Module):
    """Codebook and φ convolutions, shared by the scales.

    Args:
        vocabulary: number of codes, V.
        channels: width of a code, C.
        scales: side length of every scale, not decreasing; the last one is that of the latent.
        phi_ratio: φ(h) = (1 - a)·h + a·conv(h) with a = |phi_ratio|; about 0 means no φ at all.
        phi_sharing: number of φ spread over the scales; 0 gives every scale its own.
        phi_count: with ``phi_sharing`` 0, this many φ instead of one for every scale.
        cosine: plain `encode` matches by angle; the hybrid rule never does.
        beta: weight of the commitment in the loss.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        channels: int,
        scales: tuple[int, ...],
        phi_ratio: float = 0.5,
        phi_sharing: int = 4,
        phi_count: int = 0,
        cosine: bool = False,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        require_scales(scales)
        self.scales, self.cosine, self.beta = tuple(scales), cosine, beta
        self.phi_ratio = abs(phi_ratio)
        self.codebook_VC = normal_table(vocabulary, channels, scale=channels**-0.5)
        count = 0 if self.phi_ratio <= NO_PHI else (phi_sharing or phi_count or len(scales))
        self.phis = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count))
        self._phi_of_scale = phi_of_scale(len(scales), count)

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return self.codebook_VC.shape[0]

    @property
    def channels(self) -> int:
        """Width of a code and of the latent."""
        return self.codebook_VC.shape[1]

    @property
    def side(self) -> int:
        """Side of the latent."""
        return self.scales[-1]

    @torch.no_grad()
    def encode(self, f_BCHW: Tensor) -> list[Tensor]:
        """Indices per scale by the plain rule, with φ at the last scale too."""
        walk = self.residuals(f_BCHW, phi_at_last=True, cosine=self.cosine)
        return [indices for indices, _, _ in walk]

    @torch.no_grad()
    def encode_hybrid(self, f_BCHW: Tensor) -> HybridCodes:
        """Indices per scale, and the residual before the last scale's code is subtracted."""
        walk = list(self.residuals(f_BCHW, phi_at_last=False, cosine=False))
        rest_BCHW = walk[-1][1]
        return HybridCodes([indices for indices, _, _ in walk], rest_BCHW.flatten(2).mT)

    def decode(self, indices: Sequence[Tensor], *, phi_at_last: bool) -> Tensor:
        """The latent (B, C, H, H) that all scales add up to."""
        *_, latent_BCHW = self.partial_sums(indices, phi_at_last=phi_at_last)
        return latent_BCHW

    def partial_sums(self, indices: Sequence[Tensor], *, phi_at_last: bool) -> list[Tensor]:
        """The latent (B, C, H, H) after each of the given scales, which may stop early."""
        self._check_indices(indices)
        total: Tensor | None = None
        sums: list[Tensor] = []
        for scale, indices_BN in enumerate(indices):
            phi = phi_at_last or scale < len(self.scales) - 1
            h_BCHW = self.contribution(scale, self.embed(indices_BN), phi=phi)
            total = h_BCHW if total is None else total + h_BCHW
            sums.append(total)
        return sums

    def teacher_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """What a transformer is fed for scales 2 to S: (B, Σ p², C), row-major."""
        sums = self.partial_sums(indices[:-1], phi_at_last=False)
        return torch.cat([self.next_input(f, k + 1) for k, f in enumerate(sums)], dim=1)

    def embed(self, indices_BN: Tensor) -> Tensor:
        """Codes (B, N, C) in float32."""
        return F.embedding(indices_BN, self.codebook_VC.float())

    def contribution(self, scale_index: int, embeddings_BNC: Tensor, *, phi: bool = True) -> Tensor:
        """What the embeddings of one scale (counted from 0) add to the latent: (B, C, H, H)."""
        side = self.scales[scale_index]
        batch, _, channels = embeddings_BNC.shape
        h = embeddings_BNC.float().mT.reshape(batch, channels, side, side)
        if side != self.side:
            h = F.interpolate(h, size=(self.side, self.side), mode="bicubic")
        return self._phi(scale_index, h) if phi and self.phis else h

    def next_input(self, fhat_BCHW: Tensor, scale_index: int) -> Tensor:
        """The running sum, area-averaged to a scale (counted from 0): (B, p², C), row-major."""
        return self._resized(fhat_BCHW, scale_index).flatten(2).mT

    def quantize(self, f_BCHW: Tensor, *, discrete: bool = True) -> Quantized:
        """The training forward, with gradients (straight-through to f, loss to codes and φ).

        Args:
            f_BCHW: the latent of the encoder.
            discrete: give the sum of the codes; otherwise add the true residual, which makes f.
        """
        f, fixed = f_BCHW.float(), f_BCHW.detach().float()
        loss, indices, total = f.new_zeros(()), [], torch.zeros_like(fixed)
        for indices_BN, _, h_BCHW in self.residuals(f, phi_at_last=True, cosine=self.cosine):
            total = total + h_BCHW
            loss = loss + self.beta * F.mse_loss(total.detach(), f) + F.mse_loss(total, fixed)
            indices.append(indices_BN)
        reached = total.detach() if discrete else fixed
        return Quantized(
            reached - fixed + f, loss / len(self.scales), indices, self._used_share(indices)
        )

    def nearest(self, rows_RC: Tensor, *, cosine: bool = False) -> Tensor:
        """The nearest code of every row, (R,); the lowest index among equals."""
        codes_VC = self.codebook_VC.detach().float()
        if cosine:
            codes_VC, rows_RC = F.normalize(codes_VC, dim=1), F.normalize(rows_RC, dim=1)
        norms_V = codes_VC.square().sum(1)
        return torch.cat(
            [
                # |z|² is the same for all codes and is left out.
                (norms_V - 2 * part @ codes_VC.T if not cosine else -(part @ codes_VC.T)).argmin(1)
                for part in torch.split(rows_RC.detach().float(), ROWS_AT_ONCE)
            ]
        )

    def residuals(
        self, f_BCHW: Tensor, *, phi_at_last: bool, cosine: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The walk over the scales that every rule is: what is left, its codes, what they add.

        Yields:
            Per scale: indices (B, N), the residual before it without gradient, and its
            contribution with gradients to codes and φ, both (B, C, H, H).
        """
        self._check_latent(f_BCHW)
        rest_BCHW = f_BCHW.detach().float()
        for scale, side in enumerate(self.scales):
            z_BCpp = self._resized(rest_BCHW, scale)
            rows_RC = z_BCpp.permute(0, 2, 3, 1).reshape(-1, self.channels)
            indices_BN = self.nearest(rows_RC, cosine=cosine).view(-1, side * side)
            phi = phi_at_last or scale < len(self.scales) - 1
            h_BCHW = self.contribution(scale, self.embed(indices_BN), phi=phi)
            yield indices_BN, rest_BCHW, h_BCHW
            rest_BCHW = rest_BCHW - h_BCHW.detach()

    def _resized(self, f_BCHW: Tensor, scale_index: int) -> Tensor:
        side = self.scales[scale_index]
        if side == self.side:
            return f_BCHW
        return F.interpolate(f_BCHW, size=(side, side), mode="area")

    def _phi(self, scale_index: int, h_BCHW: Tensor) -> Tensor:
        conv = self.phis[self._phi_of_scale[scale_index]]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        mixed = F.conv2d(h_BCHW, conv.weight.float(), conv.bias.float(), padding=1)
        return h_BCHW * (1 - self.phi_ratio) + mixed * self.phi_ratio

    def _used_share(self, indices: Sequence[Tensor]) -> Tensor:
        hits_V = sum(i.flatten().bincount(minlength=self.vocabulary) for i in indices)
        assert isinstance(hits_V, Tensor)
        even_share = indices[0].shape[0] * self.side**2 / self.vocabulary
        return (hits_V >= USED_SHARE * even_share).float().mean()

    def _check_latent(self, f_BCHW: Tensor) -> None:
        wanted = (self.channels, self.side, self.side)
        if f_BCHW.ndim != 4 or tuple(f_BCHW.shape[1:]) != wanted:
            raise InvalidRequest(
                f"a latent of shape {tuple(f_BCHW.shape)}; the scales {self.scales} need "
                f"(batch, {', '.join(map(str, wanted))}); resize the picture or choose "
                "other scales",
                field="latent",
            )

    def _check_indices(self, indices: Sequence[Tensor]) -> None:
        if not indices:
            raise InvalidRequest("no token maps; give those of the first scale at least")
        sizes = [i.shape[-1] for i in indices]
        wanted = [side * side for side in self.scales]
        if sizes != wanted[: len(sizes)]:
            raise InvalidRequest(
                f"token maps of sizes {sizes}; the scales {self.scales} have {wanted}",
                field="indices",
            )
        lowest = min(int(i.min()) for i in indices)
        highest = max(int(i.max()) for i in indices)
        if lowest < 0 or highest >= self.vocabulary:
            raise InvalidRequest(
                f"tokens from {lowest} to {highest}, but the codebook has {self.vocabulary} codes; "
                "they come from another tokenizer",
                field="indices",
            )


def require_scales(scales: Sequence[int]) -> None:
    """Refuse scale lists that are empty, not positive or decreasing."""
    if not scales or min(scales) < 1 or list(scales) != sorted(scales):
        raise ConfigError(
            f"the scale list {tuple(scales)} must be side lengths that start at 1 or more and do "
            "not decrease, such as (1, 2, 3, 4)"
        )


def phi_of_scale(scales: int, count: int) -> list[int]:
    """Which of ``count`` shared φ each scale uses: the tick nearest to its relative position."""
    if count == 0:
        return []
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    # numpy's rounding decides ties (5 scales, 4 φ), so its own functions are used.
    ticks = np.linspace(margin, 1 - margin, count)
    positions = [scale / max(1, scales - 1) for scale in range(scales)]
    return [int(np.argmin(np.abs(ticks - position))) for position in positions]
