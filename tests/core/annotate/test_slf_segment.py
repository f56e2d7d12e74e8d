"""Masks for cars from a segmenter, here a small one that answers by rule."""

from collections.abc import Sequence

import numpy as np
import pytest
from gesso_core.annotate.segmenter.contract import Candidates, Embedding, Masks, Prompt
from gesso_core.annotate.slf.segment import segment
from gesso_core.annotate.slf.synthetic import SyntheticFrame
from gesso_core.errors import InvalidRequest

PICTURE = np.zeros((375, 1242, 3), np.uint8)


class RuleSegmenter:
    """Proposes the whole lower half, most trusted, then the given mask."""

    name, sha256 = "rule", "0" * 64

    def __init__(self, mask_HW: np.ndarray) -> None:
        half = np.zeros_like(mask_HW)
        half[188:] = True
        self.proposals = np.stack([half, mask_HW])

    def embed(self, picture_HW3: np.ndarray) -> Embedding:
        features = np.zeros((1, 256, 64, 64), np.float32)
        return Embedding(
            key="k", features_1CGG=features, size=picture_HW3.shape[:2], model="rule",
            model_sha256=self.sha256,
        )  # fmt: skip

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        count = len(prompts)
        masks = np.repeat(self.proposals[None], count, axis=0)
        logits, trust = np.zeros((count, 2, 8, 8), np.float32), np.tile([0.9, 0.8], (count, 1))
        return Masks(
            masks_PHW=masks[:, 0], low_res_PLL=logits[:, 0], predicted_iou_P=trust[:, 0],
            stability_P=trust[:, 0],
            candidates=Candidates(
                masks_PMHW=masks, low_res_PMLL=logits, predicted_iou_PM=trust, stability_PM=trust,
                best_P=np.zeros(count, np.int64),
            ),
        )  # fmt: skip


def test_a_box_keeps_the_mask_inside_it(frame: SyntheticFrame) -> None:
    rule = RuleSegmenter(frame.scene.objects[0].mask_HW)
    prompt = Prompt(box=(100.0, 180.0, 140.5, 260.0))
    (found,) = segment(rule, PICTURE, [prompt], frame.scene.calibration)
    rows, columns = np.nonzero(found.mask_HW)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 140, 188, 259)
    assert (found.box, found.predicted_iou) == (prompt.box, 0.9)


def test_a_point_takes_the_proposal_whose_points_have_a_cars_size(frame: SyntheticFrame) -> None:
    mask = frame.scene.objects[0].mask_HW
    rows, columns = np.nonzero(mask)
    prompt = Prompt(points=((float(np.median(columns)), float(np.median(rows))),), labels=(1,))
    scene = frame.scene
    (found,) = segment(
        RuleSegmenter(mask), PICTURE, [prompt], scene.calibration, scene.points_velo_N4
    )
    np.testing.assert_array_equal(found.mask_HW, mask)
    assert found.predicted_iou == pytest.approx(0.8)
    (blind,) = segment(RuleSegmenter(mask), PICTURE, [prompt], scene.calibration)
    assert blind.predicted_iou == pytest.approx(0.9)  # nothing but the segmenter's own opinion


def test_a_car_is_prompted_by_a_box_or_points(frame: SyntheticFrame) -> None:
    prompt = Prompt(mask_LL=np.zeros((8, 8), np.float32))
    with pytest.raises(InvalidRequest, match="box or by points"):
        segment(
            RuleSegmenter(frame.scene.objects[0].mask_HW), PICTURE, [prompt],
            frame.scene.calibration,
        )  # fmt: skip
