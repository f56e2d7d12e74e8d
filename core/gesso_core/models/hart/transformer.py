"""HART: all tokens of a scale at once, given the text and the coarser scales (arXiv 2410.10812).

The sequence is L text slots, then the slots of scale 2, 3, …, N. The input of a visual slot is the
running sum of the tokenizer, resized to its scale; its output is a distribution over codes. The
single token of scale 1 is read from the last text slot. A slot looks at its own scale and all
before it. Padding of the text is not masked, and takes part in the maximum that steers the head:
the weights were trained so.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gesso_core.errors import InvalidRequest
from gesso_core.layers.embeddings import ScalarEmbedding
from gesso_core.layers.kv_cache import KVRows
from gesso_core.layers.linear import Linear, linear
from gesso_core.layers.lone_rows import like_in_a_batch
from gesso_core.models.hart.blocks import Block, RMSNorm, pooled_text
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.residual_diffusion import ResidualDiffusion
from gesso_core.models.hart.rotary import cos_sin, grid_angles, grid_positions, text_angles

# B batch   L text slots   N new slots   M visual inputs   S all slots   K kept tokens
# D width   C latent channels   d channels of a head   V vocabulary

__all__ = ["HART", "HARTConfig", "HARTText"]


@dataclass(frozen=True)
class HARTText:
    """Embedded texts: what the first slots are, where they stand, and what they steer.

    ``positions_BL``: running number of the real tokens, -1 before the first, the last number at
    padding behind. ``head_BD`` steers the output head, ``pooled_BD`` the blocks (None if nothing
    does).
    """

    slots_BLD: Tensor
    positions_BL: Tensor
    head_BD: Tensor
    pooled_BD: Tensor | None

    def __len__(self) -> int:
        return self.slots_BLD.shape[0]

    @property
    def last(self) -> Tensor:
        """The last position, by which the grid of the visual tokens is shifted."""
        return self.positions_BL[:, -1]

    def rows(self, index: list[int] | slice) -> "HARTText":
        """Some of the texts."""
        pooled = None if self.pooled_BD is None else self.pooled_BD[index]
        return HARTText(
            self.slots_BLD[index], self.positions_BL[index], self.head_BD[index], pooled
        )

    @staticmethod
    def concatenate(parts: "list[HARTText]") -> "HARTText":
        """Stack along the batch."""
        pooled = [part.pooled_BD for part in parts if part.pooled_BD is not None]
        return HARTText(
            torch.cat([part.slots_BLD for part in parts]),
            torch.cat([part.positions_BL for part in parts]),
            torch.cat([part.head_BD for part in parts]),
            torch.cat(pooled) if pooled else None,
        )


class HART(nn.Module):
    """The transformer with its head and the network that draws the continuous residual."""

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.word_embed = Linear(config.latent_channels, width)
        self.context_norm = None
        if config.context_norm:
            self.context_norm = RMSNorm(config.context_channels, config.norm_eps)
        self.context_embed = Linear(config.context_channels, width)
        self.level_embed: nn.Module
        if config.sinusoid_levels:
            self.level_embed = ScalarEmbedding(width)
        else:
            self.level_embed = nn.Embedding(len(config.scales), width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head_norm = RMSNorm(width, config.norm_eps)
        self.head = Linear(width, config.vocabulary)
        self.decoder_norm = RMSNorm(width, config.norm_eps)
        self.residual = ResidualDiffusion(
            channels=config.latent_channels,
            condition=width,
            width=config.diffusion_width,
            depth=config.diffusion_depth,
            steps=config.diffusion_steps,
            residual_range=config.residual_range,
        )
        self.checkpoint_blocks = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.word_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.word_embed.weight.dtype

    def encode_text(
        self, states_BLC: Tensor, mask_BL: Tensor, positions_BL: Tensor | None = None
    ) -> HARTText:
        """Embed text states (B, L, C).

        ``positions_BL``: by default the running number of the real tokens.

        Raises:
            InvalidRequest: states of another length or width than the model reads.
        """
        expected = (self.config.context_tokens, self.config.context_channels)
        if tuple(states_BLC.shape[1:]) != expected:
            raise InvalidRequest(
                f"text states of shape {tuple(states_BLC.shape[1:])}; this model reads {expected}",
                field="prompt",
            )
        if positions_BL is None:
            positions_BL = text_positions(mask_BL)
        states_BLC = states_BLC.to(self.dtype)
        if self.context_norm is not None:
            states_BLC = self.context_norm(states_BLC)
        slots_BLD: Tensor = self.context_embed(states_BLC)
        return HARTText(
            slots_BLD, positions_BL, slots_BLD.amax(dim=1), self._pooled(slots_BLD, mask_BL)
        )

    def no_text(self, rows: int = 1) -> HARTText:
        """What stands for no text in guidance: zero states, all at position 0, one of them real."""
        shape = (rows, self.config.context_tokens)
        states_BLC = torch.zeros(
            *shape, self.config.context_channels, device=self.device, dtype=self.dtype
        )
        mask_BL = torch.zeros(shape, dtype=torch.long, device=self.device)
        positions_BL = torch.zeros_like(mask_BL)
        mask_BL[:, 0] = 1
        return self.encode_text(states_BLC, mask_BL, positions_BL)

    def text_slots(self, text: HARTText) -> Tensor:
        """Inputs (B, L, D) of the text slots, which are also scale 1."""
        return text.slots_BLD + self._levels()[0]

    def visual_slots(self, values_BNC: Tensor, scale: int) -> Tensor:
        """Inputs (B, N, D) of slots of one scale from the resized running sum."""
        embedded: Tensor = self.word_embed(values_BNC.to(self.dtype))
        return embedded + self._levels()[scale]

    def angles(self, text: HARTText, scale: int, kept_BK: Tensor | None = None) -> Tensor:
        """Angles (B, N, d) of the slots of a scale, or of its tokens ``kept_BK`` alone."""
        config = self.config
        if scale == 0:
            return text_angles(text.positions_BL, config.head_dim, config.rope_theta)
        positions_N2 = grid_positions(config.scales[scale], config.side, self.device)
        positions_BN2 = positions_N2 if kept_BK is None else positions_N2[kept_BK]
        positions_BN2 = positions_BN2 + text.last[:, None, None]
        return grid_angles(positions_BN2, config.head_dim, config.rope_theta)

    def run(
        self,
        x_BND: Tensor,
        angles_BNd: Tensor,
        text: HARTText,
        *,
        cache: KVRows | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KVRows | None]:
        """All blocks; returns the states (B, N, D) and the cache with the new slots.

        Args:
            x_BND: inputs of the new slots.
            angles_BNd: where they stand.
            text: for the modulation of the blocks.
            cache: slots before these, which every new slot sees.
            mask: bool, where a slot may look; None is everywhere.
        """
        table = cos_sin(angles_BNd, x_BND.dtype)
        writer = None if cache is None else cache.writer(x_BND.shape[1])
        for index, block in enumerate(self.blocks):
            place = None if writer is None else (writer, index)
            arguments: tuple[Any, ...] = (x_BND, table, mask, text.pooled_BD, place)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BND = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BND = block(*arguments)
        return x_BND, None if writer is None else writer.rows

    def forward(self, text: HARTText, teacher_BMC: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """States of all slots that predict, for training: from the last text slot onward.

        Args:
            text: embedded texts.
            teacher_BMC: inputs of scale 2 and all later ones, one after the other.
            kept_BK: tokens of the last scale that take part, in raster order; None is all.

        Returns:
            (B, 1 + M, D), with fewer slots of the last scale where ``kept_BK`` says so.
        """
        scales = self.config.scales
        inputs, angles = [self.text_slots(text)], [self.angles(text, 0)]
        parts = list(torch.split(teacher_BMC, [side * side for side in scales[1:]], dim=1))
        if kept_BK is not None:
            parts[-1] = tokens_at(parts[-1], kept_BK)
        for scale, values_BNC in enumerate(parts, start=1):
            kept = kept_BK if scale == len(scales) - 1 else None
            inputs.append(self.visual_slots(values_BNC, scale))
            angles.append(self.angles(text, scale, kept))
        mask = level_mask([part.shape[1] for part in inputs], self.device)
        states_BSD, _ = self.run(torch.cat(inputs, 1), torch.cat(angles, 1), text, mask=mask)
        return states_BSD[:, self.config.context_tokens - 1 :]

    def logits(self, states_BND: Tensor, text: HARTText) -> Tensor:
        """(B, N, V) fp32."""
        steered_BE = like_in_a_batch(self.head_modulation, F.silu(text.head_BD))
        scale, shift = steered_BE[:, None].chunk(2, dim=-1)
        normed = self.head_norm(states_BND.float()).float() * (1 + scale.float()) + shift.float()
        weight, bias = self.head.weight.float(), self.head.bias.float()
        with torch.autocast(states_BND.device.type, enabled=False):
            rows = normed.flatten(0, 1)
            logits = like_in_a_batch(lambda part: linear(part, weight, bias), rows)
            return logits.view(*normed.shape[:2], -1)

    def residual_condition(self, states_BND: Tensor, codes_BNC: Tensor) -> Tensor:
        """What the residual network is told of a token: its state and the code chosen for it."""
        normed: Tensor = self.decoder_norm(states_BND + self.word_embed(codes_BNC.to(self.dtype)))
        return normed

    def _levels(self) -> Tensor:
        """(scales, D)."""
        numbers = torch.arange(len(self.config.scales), device=self.device)
        levels: Tensor = self.level_embed(numbers)
        return levels

    def _pooled(self, slots_BLD: Tensor, mask_BL: Tensor) -> Tensor | None:
        if self.config.modulation == "none":
            return None
        shared = self.config.modulation == "shared"
        return pooled_text(slots_BLD, mask_BL, "avg" if shared else self.config.pooling)


def text_positions(mask_BL: Tensor) -> Tensor:
    """Running number of the real tokens: -1 before the first, the last number at padding behind."""
    return mask_BL.long().cumsum(dim=1) - 1


def tokens_at(values_BNC: Tensor, places_BK: Tensor) -> Tensor:
    """Some tokens of each sample, (B, K, C)."""
    return values_BNC.gather(1, places_BK[..., None].expand(-1, -1, values_BNC.shape[-1]))


def level_mask(lengths: list[int], device: torch.device) -> Tensor:
    """(S, S) bool: a slot sees its own level and all before it."""
    levels = torch.arange(len(lengths), device=device)
    level_S = levels.repeat_interleave(torch.tensor(lengths, device=device))
    return level_S[:, None] >= level_S


def without_text(text_states: Tensor, dropped_B: Tensor) -> Tensor:
    """Text states with those of some samples set to zero (a copy)."""
    return torch.where(dropped_B[:, None, None], torch.zeros_like(text_states), text_states)
