"""Sana: a linear diffusion transformer that denoises deeply compressed latents.

Sources: Sana (arXiv 2410.10629), SANA-1.5 (arXiv 2501.18427: norm of queries and keys), SANA-Sprint
(arXiv 2503.09641: guidance embedding). Configurations are in `sana_config`, the text side in
`sana_text`.

    latent → patches (+ position table) → depth × block → head → velocity
    block: linear attention → cross-attention → Mix-FFN
    time (+ guidance) → embedding → one modulation for all blocks
    text states → MLP → RMSNorm → keys and values of the cross-attention
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from gesso_kernels.depthwise_glu import tap_major
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gesso_core.errors import InvalidRequest
from gesso_core.layers.attention import CrossAttention, ReLULinearAttention
from gesso_core.layers.embeddings import PositionTable, ScalarEmbedding
from gesso_core.layers.linear import Linear, linear
from gesso_core.layers.mix_ffn import MixFFN
from gesso_core.layers.modulation import Modulation, modulated
from gesso_core.layers.tables import normal_table
from gesso_core.models.sana_config import SANA_CONFIGS, SanaConfig
from gesso_core.models.sana_text import (
    CaptionEmbedding,
    KeysValues,
    TextContext,
    mask_bias,
    without_padding,
)

__all__ = ["SANA_CONFIGS", "Sana", "SanaBlock", "SanaConfig", "TextContext", "initialize_weights"]

# B batch   C latent channels   h, w token grid   N = h·w   p patch side
# L text tokens   S text channels   D width   E values of a patch


class SanaBlock(nn.Module):
    """Linear attention → cross-attention → Mix-FFN; first and last are modulated and gated."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_eps = config.norm_eps
        self.table = normal_table(6, width, scale=width**-0.5)
        self.attention = ReLULinearAttention(
            width,
            config.head_dim,
            qk_norm=config.qk_norm,
            bias=config.attention_bias,
            eps=config.linear_attention_eps,
        )
        self.cross = CrossAttention(
            width,
            config.cross_heads,
            config.cross_head_dim,
            qk_norm=config.qk_norm,
            norm_eps=config.cross_norm_eps,
        )
        self.ffn = MixFFN(width, config.ffn_hidden)

    def forward(
        self,
        x_BND: Tensor,
        keys_values: KeysValues,
        bias_B11L: Tensor | None,
        modulation_B6D: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """(B, N, D) → (B, N, D) on a token grid of (rows, columns)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation_B6D).chunk(6, dim=1)
        attended = self.attention(x_BND, Modulation(shift1, scale1, self.norm_eps))
        x_BND = torch.addcmul(x_BND, gate1, attended)
        x_BND = x_BND + self.cross(x_BND, keys_values, bias_B11L)
        mixed = self.ffn(x_BND, *grid, Modulation(shift2, scale2, self.norm_eps))
        return torch.addcmul(x_BND, gate2, mixed)


class SanaHead(nn.Module):
    """Modulated norm → Linear: D channels to the p·p·C values of a patch."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.table = normal_table(2, width, scale=width**-0.5)
        self.linear = Linear(width, channels)

    def forward(self, x_BND: Tensor, embedding_BD: Tensor) -> Tensor:
        """The raw embedding of the time, not the blocks' modulation, shifts and scales here."""
        shift, scale = (self.table + embedding_BD[:, None]).chunk(2, dim=1)
        return modulated(self.linear, x_BND, Modulation(shift, scale, 1e-6))


class Sana(nn.Module):
    """The denoiser: predicts the velocity ``noise − data`` of a rectified flow.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its
            activations.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.config = config
        self.gradient_checkpointing = False
        self.patch = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.positions = (
            None
            if config.interpolation_scale is None
            else PositionTable(width, config.sample_size // patch, config.interpolation_scale)
        )
        self.time = ScalarEmbedding(width)
        self.guidance = ScalarEmbedding(width) if config.guidance_embedding else None
        self.modulation = Linear(width, 6 * width)
        self.caption = CaptionEmbedding(config.caption_channels, width)
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
        self.head = SanaHead(width, patch * patch * config.out_channels)

    def forward(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor,
        text_BLS: Tensor | TextContext,
        text_mask_BL: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity at a noisy latent.

        Args:
            latent_BCHW: noisy latent, height and width multiples of the patch size.
            timestep_B: time of each sample, 0..1000 (Sprint: flow time in 0..1).
            text_BLS: states of the text encoder, or what `encode_text` made of them.
            text_mask_BL: 1 or True where a token counts; None if all do, or with a `TextContext`.
            guidance_B: guidance scale times ``config.guidance_embeds_scale``; for Sprint models.

        Returns:
            (B, C, H, W) in the dtype of the weights.

        Raises:
            InvalidRequest: a latent that the patches do not tile, or guidance where there is none.
        """
        grid = self._grid(latent_BCHW)
        embedding_BD = self._embed_time(timestep_B, guidance_B)
        modulation_B6D = self.modulation(F.silu(embedding_BD)).view(len(embedding_BD), 6, -1)
        keys_values, bias_B11L = self._attend_to(text_BLS, text_mask_BL)
        x_BND = self._patches(latent_BCHW, grid)
        for block, block_keys_values in zip(self._blocks(), keys_values, strict=True):
            inputs = (x_BND, block_keys_values, bias_B11L, modulation_B6D, grid)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BND = block(*inputs)
        return self._unpatched(self.head(x_BND, embedding_BD), grid)

    def encode_text(self, text_BLS: Tensor, text_mask_BL: Tensor | None = None) -> TextContext:
        """Keys and values of every block for a text, to be used at all steps of a sampling run.

        About ``2 · depth · L · D`` numbers per text; masked tokens at the end are left out.
        """
        keys_values, bias_B11L = self._attend_to(text_BLS, text_mask_BL)
        return TextContext(tuple(keys_values), bias_B11L)

    def chunk_ffn(self, chunks: int) -> None:
        """Work through the hidden channels of every Mix-FFN in parts, to save memory at 4096 px."""
        for block in self._blocks():
            block.ffn.chunks = chunks

    def lay_out_for_kernels(self) -> None:
        """Store the depthwise weights as the GPU kernel reads them; their numbers stay."""
        for block in self._blocks():
            weight = block.ffn.depthwise.weight
            weight.data = tap_major(weight.data)

    def _blocks(self) -> Iterator[SanaBlock]:
        return (cast(SanaBlock, block) for block in self.blocks)

    def _attend_to(
        self, text_BLS: Tensor | TextContext, mask_BL: Tensor | None
    ) -> tuple[Iterator[KeysValues], Tensor | None]:
        """Keys and values block by block; those of a raw text are made when their turn comes."""
        if isinstance(text_BLS, TextContext):
            return iter(text_BLS.keys_values), text_BLS.bias
        text_BLS = text_BLS.to(self.caption.hidden.weight.dtype)
        if mask_BL is not None:
            text_BLS, mask_BL = without_padding(text_BLS, mask_BL)
        tokens_BLD = self.caption(text_BLS)
        keys_values = (block.cross.keys_values(tokens_BLD) for block in self._blocks())
        return keys_values, None if mask_BL is None else mask_bias(mask_BL, tokens_BLD.dtype)

    def _embed_time(self, timestep_B: Tensor, guidance_B: Tensor | None) -> Tensor:
        embedding_BD: Tensor = self.time(timestep_B)
        if (self.guidance is None) != (guidance_B is None):
            raise InvalidRequest(
                "this Sana takes its guidance as an input (a distilled Sprint model); pass guidance"
                if guidance_B is None
                else "this Sana has no guidance embedding; use classifier-free guidance instead",
                field="guidance_scale",
            )
        if self.guidance is None or guidance_B is None:
            return embedding_BD
        return torch.add(embedding_BD, self.guidance(guidance_B))

    def _grid(self, latent_BCHW: Tensor) -> tuple[int, int]:
        height, width = latent_BCHW.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise InvalidRequest(
                f"a latent of {height}x{width} cannot be cut into patches of {patch}; "
                f"make both sides a multiple of {patch}"
            )
        return height // patch, width // patch

    def _patches(self, latent_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        # As a product: a convolution's order of additions would depend on the size of the batch.
        patch = self.config.patch_size
        cells_BNE = F.pixel_unshuffle(latent_BCHW.to(self.patch.weight.dtype), patch)
        x_BND = linear(
            cells_BNE.flatten(2).mT.contiguous(), self.patch.weight.flatten(1), self.patch.bias
        )
        return x_BND if self.positions is None else x_BND + self.positions(*grid, like=x_BND)

    def _unpatched(self, patches_BNE: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h·w, p·p·C) → (B, C, h·p, w·p)."""
        (rows, columns), patch = grid, self.config.patch_size
        cells = patches_BNE.view(len(patches_BNE), rows, columns, patch, patch, -1)
        image = cells.permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(cells), -1, rows * patch, columns * patch)


@torch.no_grad()
def initialize_weights(model: Sana, generator: torch.Generator) -> None:
    """Draw fresh weights for training from scratch, in the order of the module tree.

    Linear layers are Xavier-uniform with zero bias, and so is the weight of the patch convolution;
    the MLPs of time and caption and the modulation are N(0, 0.02²); tables are N(0, 1/D); all else
    of a convolution keeps the library's bounds; the norm of the caption starts at 0.01 and the
    second layer of the guidance MLP at zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MixFFN):
            for conv in (module.expand, module.depthwise, module.project):
                _uniform_conv(conv.weight, conv.bias, generator)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, SanaBlock | SanaHead):
            nn.init.normal_(module.table, std=model.config.width**-0.5, generator=generator)
    _uniform_conv(model.patch.weight, model.patch.bias, generator)
    nn.init.xavier_uniform_(model.patch.weight.flatten(1), generator=generator)
    nn.init.constant_(model.caption.norm.weight, 0.01)
    small = [model.time.hidden, model.time.out, model.modulation]
    small += [model.caption.hidden, model.caption.out]
    small += [] if model.guidance is None else [model.guidance.hidden]
    for layer in small:
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    if model.guidance is not None:
        nn.init.zeros_(model.guidance.out.weight)


def _uniform_conv(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    bound = weight[0].numel() ** -0.5
    nn.init.uniform_(weight, -bound, bound, generator=generator)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound, generator=generator)
