"""Where the training of a vision tower begins: so that features and decoder are of use at once.

Axes: N patches or vectors, P numbers of a patch, B batch, S side, H and W latent grid, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gesso_core.layers.vqgan import Decoder, ResidualBlock, Upsample
from gesso_core.models.vila_u.vision_tower import VisionTower

BRANCH = 0.1  # initial share of what the transformer layers add to the linear code
BLOCK = 0.3  # initial share of what a residual block adds
OFF_CENTER = 0.1  # initial share of what an upsampling does besides interpolating


@torch.no_grad()
def start_linear(tower: VisionTower, pixels_B3SS: Tensor) -> None:
    """Make the patch embedding the principal components of the patches, of mean square 1.

    The transformer layers begin as small corrections of this linear code.
    """
    embedding = tower.encoder.embeddings.patch_embedding
    patches_NP = F.unfold(pixels_B3SS, embedding.kernel_size, stride=embedding.stride)
    patches_NP = patches_NP.transpose(1, 2).flatten(0, 1)
    mean_P = patches_NP.mean(dim=0)
    _, components_PP = torch.linalg.eigh((patches_NP - mean_P).T @ (patches_NP - mean_P))
    basis_CP = components_PP.T.flip(0)[: embedding.out_channels]
    code_NC = (patches_NP - mean_P) @ basis_CP.T
    basis_CP = basis_CP / code_NC.square().mean().sqrt()
    embedding.weight[: len(basis_CP)] = basis_CP.view(-1, *embedding.weight.shape[1:])
    embedding.bias[: len(basis_CP)] = -basis_CP @ mean_P
    nn.init.normal_(tower.encoder.embeddings.position_embedding.weight, std=0.02)
    for layer in tower.encoder.encoder.layers[:-1]:
        layer.self_attn.out_proj.weight.mul_(BRANCH)
        layer.mlp.fc2.weight.mul_(BRANCH)


@torch.no_grad()
def start_smooth(decoder: Decoder) -> None:
    """Let every upsampling begin as a smooth interpolation, and every block as a small change."""
    line_3 = torch.tensor([1.0, 2.0, 1.0]) / 4
    for module in decoder.modules():
        if isinstance(module, Upsample):
            weight, diagonal = module.conv.weight, torch.arange(module.conv.out_channels)
            weight.mul_(OFF_CENTER)
            weight[diagonal, diagonal] += (line_3[:, None] * line_3).to(weight)
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(BLOCK)


@torch.no_grad()
def start_tables(tower: VisionTower, latent_BHWC: Tensor, generator: Generator) -> None:
    """Fill the tables with vectors of a batch and with what nearer rows have left of them."""
    quantizer = tower.quantizer
    left_NC = quantizer.to_code_shape(latent_BHWC).reshape(-1, quantizer.width).float()
    for book in dict.fromkeys(quantizer.tables):
        parts = quantizer.depth // 2 if quantizer.shared else 1
        size = book.entries // parts
        for part in range(parts):
            rows = slice(part * size, book.entries if part == parts - 1 else (part + 1) * size)
            count = rows.stop - rows.start
            chosen = torch.randint(len(left_NC), (count,), generator=generator)
            book.table_VC[rows] = left_NC[chosen]
            nearest_N = torch.cdist(left_NC, book.table_VC[rows]).argmin(dim=1)
            left_NC = left_NC - book.table_VC[rows][nearest_N]
        book.counts_V.fill_(1.0)
        book.sums_VC.copy_(book.table_VC[:-1])
