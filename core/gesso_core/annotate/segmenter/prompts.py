"""Prompts in the frame of a model, grouped so that each group is one batch.

A prompt's points and corners become tokens that attend to each other, so padding a short prompt to
the length of a long one would change its answer. Only prompts of the same build share a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gesso_core.annotate.segmenter.contract import Prompt
from gesso_core.annotate.segmenter.preprocess import Frame
from gesso_core.errors import InvalidRequest

# P prompts of a group   N points   T tokens   L side of the low-resolution logits

PADDING: Final = -1
TOP_LEFT: Final = 2
BOTTOM_RIGHT: Final = 3
# SAM was trained to answer with one mask when it is told more than this.
AMBIGUOUS_TOKENS: Final = 2


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """Prompts with equally many points, all with a box or none, all with a mask or none.

    Attributes:
        places: where each prompt stands among all that were asked.
        points_PN2, labels_PN: in the frame; N may be 0.
        boxes_P4: in the frame.
        masks_P1LL: logits of former masks.
    """

    places: list[int]
    points_PN2: Tensor
    labels_PN: Tensor
    boxes_P4: Tensor | None
    masks_P1LL: Tensor | None

    @property
    def ambiguous(self) -> bool:
        """Whether so little is said that the best of three proposals is the answer."""
        corners_or_padding = 1 if self.boxes_P4 is None else 2
        return self.points_PN2.shape[1] + corners_or_padding <= AMBIGUOUS_TOKENS

    def tokens(self) -> tuple[Tensor, Tensor]:
        """(P, T, 2) places and (P, T) labels: points, then the box's corners or one padding."""
        count = len(self.places)
        if self.boxes_P4 is None:
            extra_P12, kinds = torch.zeros(count, 1, 2), [PADDING]
        else:
            extra_P12, kinds = self.boxes_P4.view(count, 2, 2), [TOP_LEFT, BOTTOM_RIGHT]
        labels_PT = torch.cat([self.labels_PN, torch.tensor(kinds).expand(count, -1)], dim=1)
        return torch.cat([self.points_PN2, extra_P12], dim=1), labels_PT

    def parts(self, at_most: int) -> Iterator["PromptGroup"]:
        """The group in pieces of at most so many prompts, which bounds the memory."""
        for start in range(0, len(self.places), at_most):
            rows = slice(start, start + at_most)
            yield PromptGroup(
                self.places[rows],
                self.points_PN2[rows],
                self.labels_PN[rows],
                None if self.boxes_P4 is None else self.boxes_P4[rows],
                None if self.masks_P1LL is None else self.masks_P1LL[rows],
            )


def group_prompts(prompts: Sequence[Prompt], frame: Frame, side: int) -> list[PromptGroup]:
    """The prompts in the frame, in groups of one build.

    Raises InvalidRequest for a mask that does not have ``side`` x ``side`` logits.
    """
    builds: dict[tuple[int, bool, bool], list[int]] = {}
    for place, prompt in enumerate(prompts):
        mask = prompt.mask_LL
        if mask is not None and mask.shape != (side, side):
            raise InvalidRequest(
                f"the mask of prompt {place} is {mask.shape}; this model takes {side}x{side} "
                "logits, as it answers them",
                field="mask",
            )
        build = (len(prompt.points), prompt.box is not None, mask is not None)
        builds.setdefault(build, []).append(place)
    return [_group(prompts, places, frame) for places in builds.values()]


def _group(prompts: Sequence[Prompt], places: list[int], frame: Frame) -> PromptGroup:
    members = [prompts[place] for place in places]
    points = np.array([p.points for p in members], dtype=np.float64).reshape(len(members), -1, 2)
    boxes = [p.box for p in members if p.box is not None]
    masks = [p.mask_LL for p in members if p.mask_LL is not None]
    return PromptGroup(
        places,
        torch.from_numpy(frame.points(points)).float(),
        torch.tensor([p.labels for p in members], dtype=torch.int64).view(len(members), -1),
        torch.from_numpy(frame.boxes(np.array(boxes))).float() if boxes else None,
        torch.from_numpy(np.stack(masks)[:, None]).float() if masks else None,
    )
