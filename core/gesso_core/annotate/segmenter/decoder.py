"""SAM's prompt encoder and mask decoder, many prompts of one picture at a time (arXiv 2304.02643).

A prompt is a handful of tokens, the picture is 4,096 positions, and the published formula projects
all positions for each attention and each prompt anew. In the first block the picture is the same
for all prompts, so it is projected once. Later each prompt has its own picture; but projections are
linear, so there they move to the tokens' side, where they are nearly free:

    scores   (x W_k)·q  =  x·(W_k q)          values   Σ a (x W_v)  =  (Σ a x) W_v

The biases follow: one that adds the same to all positions vanishes in the softmax, and one behind
weights that sum to 1 is added once. The upscaling convolutions do not overlap, so they are linear
layers, and channels stay the last axis until one number per pixel is left. Which of the proposals
is the best is known before it is painted, so only that one need be.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.annotate.segmenter.prompt_encoder import PromptEncoder

# P prompts   T tokens   N positions of the picture   C channels   A heads   D channels of a head
# G side of the grid, N = G·G   M masks   L = 4·G side of the logits

CHANNELS = 256
HEADS = 8
MASKS = 4  # the single answer, and three proposals
STRIPES = 16  # the least batch of 1x1 convolutions that torch gives to oneDNN


class Seen(NamedTuple):
    """A picture that several prompts start from, and its projections in the first block."""

    picture_PNC: Tensor
    keys_PAND: Tensor
    values_PAND: Tensor
    queries_PAND: Tensor


class Attention(nn.Module):
    """The four projections of an attention; who reads whom is a method's business."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.q = nn.Linear(channels, inner)
        self.k = nn.Linear(channels, inner)
        self.v = nn.Linear(channels, inner)
        self.out = nn.Linear(inner, channels)
        self.scale = 1 / math.sqrt(inner // HEADS)

    def forward(self, q_PTC: Tensor, k_PAXD: Tensor, v_PAXD: Tensor) -> Tensor:
        """Tokens read what was projected already, tokens or a picture."""
        scores_PATX = (self.scale * _heads(self.q(q_PTC))) @ k_PAXD.mT
        read_PTC: Tensor = self.out(_joined(scores_PATX.softmax(dim=-1) @ v_PAXD))
        return read_PTC

    def of_picture(self, q_PTC: Tensor, k_PNC: Tensor, v_PNC: Tensor) -> Tensor:
        """Tokens read a picture that was not projected."""
        tokens, channels = q_PTC.shape[1:]
        q_PATC = (self.scale * _heads(self.q(q_PTC))) @ _rows_by_head(self.k.weight)
        weights_PBN = (q_PATC.flatten(1, 2) @ k_PNC.mT).softmax(dim=-1)
        pooled_PATC = (weights_PBN @ v_PNC).view(-1, HEADS, tokens, channels)
        values_PATD = pooled_PATC @ _rows_by_head(self.v.weight).mT
        read_PTC: Tensor = self.out(_joined(values_PATD) + self.v.bias)
        return read_PTC

    def asked_by_picture(self, k_PTC: Tensor, q_PNC: Tensor) -> Tensor:
        """What every position of a picture, not projected, pays to each token: (P, A·T, N)."""
        prompts, tokens = k_PTC.shape[:2]
        k_PATD = self.scale * _heads(self.k(k_PTC))
        asked_PBC = (k_PATD @ _rows_by_head(self.q.weight)).flatten(1, 2)
        offset_PB1 = (k_PATD @ self.q.bias.view(HEADS, -1, 1)).flatten(1, 2)
        scores_PBN = asked_PBC @ q_PNC.mT + offset_PB1
        return scores_PBN.view(prompts, HEADS, tokens, -1).softmax(dim=2).flatten(1, 2)

    def asked_by_projected(self, k_PTC: Tensor, q_PAND: Tensor) -> Tensor:
        """The same for a picture whose queries are at hand."""
        k_PATD = self.scale * _heads(self.k(k_PTC))
        return (k_PATD @ q_PAND.mT).softmax(dim=2).flatten(1, 2)

    def tell_picture(self, picture_PNC: Tensor, weights_PBN: Tensor, v_PTC: Tensor) -> Tensor:
        """The picture plus what it reads from the tokens with these weights."""
        # The weights of each head sum to 1: an eighth of the bias per head is the whole bias.
        told_PATC = _heads(self.v(v_PTC)) @ _columns_by_head(self.out.weight).mT
        told_PBC = (told_PATC + self.out.bias / HEADS).flatten(1, 2)
        picture_PNC = picture_PNC.expand(len(told_PBC), -1, -1)
        return torch.baddbmm(picture_PNC, weights_PBN.mT, told_PBC)


class Block(nn.Module):
    """Tokens among themselves → tokens read the picture → MLP → the picture reads the tokens."""

    def __init__(self, channels: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.among_tokens = Attention(channels, channels)
        self.of_picture = Attention(channels, channels // 2)
        self.mlp_in = nn.Linear(channels, hidden)
        self.mlp_out = nn.Linear(hidden, channels)
        self.into_picture = Attention(channels, channels // 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            nn.LayerNorm(channels, eps=eps) for _ in range(4)
        )

    def see(self, picture_PNC: Tensor, grid_NC: Tensor) -> Seen:
        """Project a picture for `first`."""
        placed_PNC = picture_PNC + grid_NC
        return Seen(
            picture_PNC,
            _heads(_everywhere(self.of_picture.k, placed_PNC)),
            _heads(_everywhere(self.of_picture.v, picture_PNC)),
            _heads(_everywhere(self.into_picture.q, placed_PNC)),
        )

    def first(self, prompt: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """The round in which the tokens are the prompt itself, (P, T, C), placed already."""
        tokens = self.norm1(self._mix(prompt, prompt))
        read = self.of_picture(tokens + prompt, seen.keys_PAND, seen.values_PAND)
        tokens = self._think(tokens + read)
        weights = self.into_picture.asked_by_projected(tokens + prompt, seen.queries_PAND)
        return tokens, self._tell(seen.picture_PNC, weights, tokens)

    def forward(
        self, tokens: Tensor, picture: Tensor, prompt: Tensor, grid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A later round; ``prompt`` and ``grid`` are added to whatever asks or is asked."""
        tokens = self.norm1(tokens + self._mix(tokens + prompt, tokens))
        placed = picture + grid
        tokens = self._think(tokens + self.of_picture.of_picture(tokens + prompt, placed, picture))
        weights = self.into_picture.asked_by_picture(tokens + prompt, placed)
        return tokens, self._tell(picture, weights, tokens)

    def _mix(self, asking: Tensor, tokens: Tensor) -> Tensor:
        mix = self.among_tokens
        mixed: Tensor = mix(asking, _heads(mix.k(asking)), _heads(mix.v(tokens)))
        return mixed

    def _think(self, tokens: Tensor) -> Tensor:
        tokens = self.norm2(tokens)
        thought: Tensor = self.norm3(tokens + self.mlp_out(self.mlp_in(tokens).relu()))
        return thought

    def _tell(self, picture: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        told: Tensor = self.norm4(self.into_picture.tell_picture(picture, weights, tokens))
        return told


class MLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(channels, width) for width in (channels, channels, out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, out)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        last: Tensor = self.layers[-1](x)
        return last


class PromptDecoder(nn.Module):
    """From the features of a picture and a batch of prompts to logits and predicted IoU."""

    grid_NC: Tensor

    def __init__(
        self, *, channels: int = CHANNELS, hidden: int = 2048, edge: int = 1024,
        grid: int = 64, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        """Build with zeros; ``norm_eps`` is that of the norms inside the blocks.

        Args:
            channels: C.
            hidden: width of the MLP inside a block.
            edge: side of the model's frame in pixels.
            grid: G.
            norm_eps: 1e-5 in the authors' code, 1e-6 in that of transformers.
        """
        super().__init__()
        self.prompts = PromptEncoder(channels, edge, grid)
        self.iou_token = nn.Parameter(torch.zeros(1, channels))
        self.mask_tokens = nn.Parameter(torch.zeros(MASKS, channels))
        self.block1 = Block(channels, hidden, norm_eps)
        self.block2 = Block(channels, hidden, norm_eps)
        self.last_look = Attention(channels, channels // 2)
        self.last_norm = nn.LayerNorm(channels)
        self.up1 = nn.ConvTranspose2d(channels, channels // 4, 2, stride=2)
        self.up_norm = nn.LayerNorm(channels // 4, eps=1e-6)
        self.up2 = nn.ConvTranspose2d(channels // 4, channels // 8, 2, stride=2)
        self.mask_heads = nn.ModuleList(MLP(channels, channels // 8) for _ in range(MASKS))
        self.iou_head = MLP(channels, MASKS)
        self.register_buffer("grid_NC", torch.zeros(grid * grid, channels), persistent=False)

    def filled(self, state: Mapping[str, Tensor]) -> "PromptDecoder":
        """The same decoder with exactly these weights, in eval mode, frozen."""
        self.load_state_dict(state)
        self.requires_grad_(False)
        self.grid_NC = self.prompts.grid_positions()
        return self.eval()

    def look(self, features_1CGG: Tensor, masks_P1LL: Tensor | None = None) -> Seen:
        """What all prompts without a mask share; with masks, what each starts from."""
        # Channels last in memory, too: every later step reads one position after the other.
        features_1NC = features_1CGG.flatten(2).mT.contiguous()
        picture_PNC = features_1NC + self.prompts.mask_features(masks_P1LL)
        return self.block1.see(picture_PNC, self.grid_NC)

    def forward(
        self, seen: Seen, places_PT2: Tensor, labels_PT: Tensor, *, several: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (P, M, L, L) and predicted IoU (P, M): M is 3 proposals if several, else 1."""
        picture_PNC, brushes_PMc, iou_PM = self.think(seen, places_PT2, labels_PT, several=several)
        return self.paint(picture_PNC, brushes_PMc), iou_PM

    def think(
        self, seen: Seen, places_PT2: Tensor, labels_PT: Tensor, *, several: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The picture (P, N, C) as each prompt sees it, a brush (P, M, C/8) per mask to `paint` it
        with, and predicted IoU (P, M).
        """
        said_PTC = self.prompts.tokens(places_PT2, labels_PT)
        own_TC = torch.cat([self.iou_token, self.mask_tokens])
        prompt = torch.cat([own_TC.expand(len(said_PTC), -1, -1), said_PTC], dim=1)
        tokens, picture = self.block1.first(prompt, seen)
        tokens, picture = self.block2(tokens, picture, prompt, self.grid_NC)
        chosen = range(1, MASKS) if several else range(1)
        # Only what is answered looks a last time: the token of the IoU, and those of the masks.
        answers = [0, *(1 + mask for mask in chosen)]
        tokens, prompt = tokens[:, answers], prompt[:, answers]
        read = self.last_look.of_picture(tokens + prompt, picture + self.grid_NC, picture)
        tokens = self.last_norm(tokens + read)
        brushes_PMc = torch.stack(
            [self.mask_heads[mask](tokens[:, 1 + row]) for row, mask in enumerate(chosen)], dim=1
        )
        iou_PM = self.iou_head(tokens[:, 0])[:, chosen.start : chosen.stop]
        return picture, brushes_PMc, iou_PM

    def paint(self, picture_PNC: Tensor, brushes_PMc: Tensor) -> Tensor:
        """Logits (P, M, L, L): the picture upscaled four times, read with one vector per mask."""
        side, count = self.prompts.grid, brushes_PMc.shape[1]
        x = F.gelu(self.up_norm(_grow(self.up1, picture_PNC)))
        x = F.gelu(_grow(self.up2, x))
        logits = brushes_PMc @ x.flatten(1, -2).mT
        # The pixels came apart as row, column, row and column in 2x2, row and column in 2x2.
        logits = logits.view(-1, count, side, side, 2, 2, 2, 2)
        logits = logits.permute(0, 1, 2, 4, 6, 3, 5, 7)
        return logits.reshape(-1, count, 4 * side, 4 * side)


def _grow(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A 2x2 convolution of stride 2, backwards: (…, C) → (…, 2·2, O)."""
    weight_RC = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # rows, columns, outputs
    assert layer.bias is not None
    grown = _linear_everywhere(x, weight_RC, layer.bias.repeat(4))
    return grown.view(*x.shape[:-1], 4, layer.out_channels)


def _everywhere(layer: nn.Linear, x: Tensor) -> Tensor:
    return _linear_everywhere(x, layer.weight, layer.bias)


def _linear_everywhere(x: Tensor, weight_OC: Tensor, bias_O: Tensor) -> Tensor:
    """A linear layer at thousands of places, (…, C) → (…, O).

    torch hands linear layers to MKL, which leaves half of the vector units of AMD's processors
    idle, and 1x1 convolutions of 16 pictures and more to oneDNN, which does not. Places cut into 16
    stripes are such pictures, channels last, and nothing is copied.
    """
    places, channels = x.numel() // x.shape[-1], x.shape[-1]
    if x.device.type != "cpu" or places % STRIPES or not x.is_contiguous():
        return F.linear(x, weight_OC, bias_O)
    stripes_SC1n = x.view(STRIPES, 1, places // STRIPES, channels).permute(0, 3, 1, 2)
    made_SO1n = F.conv2d(stripes_SC1n, weight_OC[:, :, None, None], bias_O)
    return made_SO1n.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight_OC))


def _heads(x_PTE: Tensor) -> Tensor:
    """(P, T, A·D) → (P, A, T, D)."""
    return x_PTE.view(*x_PTE.shape[:2], HEADS, -1).transpose(1, 2)


def _joined(x_PATD: Tensor) -> Tensor:
    return x_PATD.transpose(1, 2).flatten(2)


def _rows_by_head(weight_EC: Tensor) -> Tensor:
    """(A·D, C) → (A, D, C)."""
    return weight_EC.view(HEADS, -1, weight_EC.shape[1])


def _columns_by_head(weight_CE: Tensor) -> Tensor:
    """(C, A·D) → (A, C, D)."""
    return weight_CE.view(weight_CE.shape[0], HEADS, -1).transpose(0, 1)
