"""From prompts to masks, the same for every network: batch, decode, choose, stretch, judge."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gesso_core.annotate.segmenter.contract import (
    Candidates,
    Embedding,
    Masks,
    Prompt,
    check_prompts,
)
from gesso_core.annotate.segmenter.preprocess import Frame
from gesso_core.annotate.segmenter.prompts import PromptGroup, group_prompts
from gesso_core.errors import InvalidRequest, NumericalError

# P prompts   M masks of each   H, W picture   L side of the low-resolution logits

# A network's part: a group, and whether three proposals are wanted or one mask, in;
# logits (P, M, L, L) and predicted IoU (P, M) out. Of three it may leave out all but the best.
Decode = Callable[[PromptGroup, bool], tuple[Tensor, Tensor]]

PROPOSALS: Final = 3
STABILITY_MARGIN: Final = 1.0
# Prompts decoded together. More gain nothing on a CPU and cost about 40 MB each.
AT_ONCE: Final = 8


def answer(
    decode: Decode,
    frame: Frame,
    side: int,
    prompts: Sequence[Prompt],
    *,
    multimask: bool,
    at_once: int = AT_ONCE,
) -> Masks:
    """One mask per prompt, as `Segmenter.predict` promises it.

    Args:
        decode: the network.
        frame: of the picture.
        side: L.
        prompts: checked here against the picture.
        multimask: answer with all proposals as well.
        at_once: prompts per call of ``decode``.
    """
    check_prompts(prompts, frame.size)
    count, kept = len(prompts), PROPOSALS if multimask else 1
    masks_PMHW = np.zeros((count, kept, *frame.size), dtype=np.bool_)
    low_res_PMLL = np.zeros((count, kept, side, side), dtype=np.float32)
    iou_PM, stability_PM = np.zeros((2, count, kept), dtype=np.float32)
    for group in group_prompts(prompts, frame, side):
        several = multimask or group.ambiguous
        for part in group.parts(at_once):
            logits_pMLL, guess_pM = decode(part, several)
            if several and not multimask:
                logits_pMLL, guess_pM = best(logits_pMLL, guess_pM)
            if not (torch.isfinite(logits_pMLL).all() and torch.isfinite(guess_pM).all()):
                raise NumericalError("the segmenter produced numbers that are not finite")
            places = part.places
            low_res_PMLL[places], iou_PM[places] = logits_pMLL.numpy(), guess_pM.numpy()
            for place, logits_MLL in zip(places, logits_pMLL, strict=True):
                for mask, logits_LL in enumerate(logits_MLL):
                    stability_PM[place, mask] = _stretch(frame, logits_LL, masks_PMHW[place, mask])
    return _masks(masks_PMHW, low_res_PMLL, iou_PM, stability_PM)


def _stretch(frame: Frame, logits_LL: Tensor, mask_HW: np.ndarray) -> float:
    """Fill the mask at the picture's size, and return its stability: IoU of the mask cut at +1
    with the mask cut at -1, 0 where there is no mask at all.
    """
    inner = outer = 0
    # Band by band: the logits of a large picture would not fit a core's cache.
    for rows, columns, band in frame.bands(logits_LL, above=-STABILITY_MARGIN):
        logits_hw = band.numpy()
        np.greater(logits_hw, 0, out=mask_HW[rows, columns])
        inner += int(np.count_nonzero(logits_hw > STABILITY_MARGIN))
        outer += int(np.count_nonzero(logits_hw > -STABILITY_MARGIN))
    return inner / max(outer, 1)


def best(proposed_PM: Tensor, iou_PM: Tensor) -> tuple[Tensor, Tensor]:
    """Of each prompt's proposals the one of highest predicted IoU: (P, 1, …) and (P, 1)."""
    rows, best_P = torch.arange(len(iou_PM)), iou_PM.argmax(dim=1)
    return proposed_PM[rows, best_P, None], iou_PM[rows, best_P, None]


def require_own(embedding: Embedding, name: str, sha256: str) -> None:
    """Raise InvalidRequest for an embedding that another segmenter made."""
    if embedding.model_sha256 != sha256:
        raise InvalidRequest(
            f"this embedding is of {embedding.model} ({embedding.model_sha256[:12]}), the "
            f"segmenter is {name} ({sha256[:12]}); embed the picture again",
            field="embedding",
        )


def _masks(
    masks_PMHW: np.ndarray, low_res_PMLL: np.ndarray, iou_PM: np.ndarray, stability_PM: np.ndarray
) -> Masks:
    if iou_PM.shape[1] == 1:  # views: the masks of large pictures are not copied
        return Masks(
            masks_PHW=masks_PMHW[:, 0],
            low_res_PLL=low_res_PMLL[:, 0],
            predicted_iou_P=iou_PM[:, 0],
            stability_P=stability_PM[:, 0],
        )
    rows, best_P = np.arange(len(iou_PM)), iou_PM.argmax(axis=1)
    return Masks(
        masks_PHW=masks_PMHW[rows, best_P],
        low_res_PLL=low_res_PMLL[rows, best_P],
        predicted_iou_P=iou_PM[rows, best_P],
        stability_P=stability_PM[rows, best_P],
        candidates=Candidates(
            masks_PMHW=masks_PMHW,
            low_res_PMLL=low_res_PMLL,
            predicted_iou_PM=iou_PM,
            stability_PM=stability_PM,
            best_P=best_P,
        ),
    )
