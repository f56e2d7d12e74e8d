"""The training loss: next-token cross-entropy of the text, plus that of the codes, 1 to 1.

The state at index t predicts what stands at t + 1: a text token through the language head, a visual
token through the depth transformer. Visual tokens of pictures that are not the answer, and prompts,
carry `IGNORED`. The paper weighs all codes of a visual token alike; a small model may be told that
the first ones, which carry most of the picture, count more.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.splice import IGNORED, Batch

# B rows   L tokens   S width of the states   D codes of a position   V text vocabulary
# M supervised text tokens   R supervised positions of pictures


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean cross-entropy per text token and per code; zero where a batch has none."""

    text: Tensor
    image: Tensor

    @property
    def total(self) -> Tensor:
        """Both, with equal weights."""
        return self.text + self.image


def training_losses(model: VilaU, batch: Batch, *, depth_weights_D: Tensor | None = None) -> Losses:
    """Both losses of a batch, packed or padded.

    Args:
        model: the model.
        batch: from `pack_rows` or `pad_rows`.
        depth_weights_D: what a code at each depth counts, with mean 1; alike when left out.
    """
    states_BLS = model.states(batch)
    states_NS = states_BLS[:, :-1].flatten(0, 1)
    targets_ND = batch.labels_BLD[:, 1:].flatten(0, 1)
    if batch.segments_BL is not None:  # a packed row does not predict its neighbour
        segments = batch.segments_BL
        crosses_N = (segments[:, 1:] != segments[:, :-1]).flatten()
        targets_ND = targets_ND.masked_fill(crosses_N[:, None], IGNORED)
    vocabulary = model.config.vocabulary
    visual_N = targets_ND[:, 0] >= vocabulary
    text_N = (targets_ND[:, 0] != IGNORED) & ~visual_N
    return Losses(
        text=_text_loss(model, states_NS[text_N], targets_ND[text_N, 0]),
        image=_image_loss(
            model, states_NS[visual_N], targets_ND[visual_N] - vocabulary, depth_weights_D
        ),
    )


def _text_loss(model: VilaU, states_MS: Tensor, targets_M: Tensor) -> Tensor:
    if not len(targets_M):
        return states_MS.sum() * 0.0
    return F.cross_entropy(model.text_logits(states_MS).float(), targets_M)


def _image_loss(
    model: VilaU, states_RS: Tensor, codes_RD: Tensor, weights_D: Tensor | None
) -> Tensor:
    """All positions of all pictures, and of all frames of videos, are one batch."""
    if not len(codes_RD):
        return states_RS.sum() * 0.0
    sums_RDC = model.tower.embed_partial(codes_RD).detach()
    logits_RDK = model.depth_transformer(states_RS, sums_RDC)
    logits_NK, codes_N = logits_RDK.flatten(0, 1).float(), codes_RD.flatten()
    if weights_D is None:
        return F.cross_entropy(logits_NK, codes_N)
    each_RD = F.cross_entropy(logits_NK, codes_N, reduction="none").view(codes_RD.shape)
    return (each_RD * weights_D.to(each_RD)).mean()
