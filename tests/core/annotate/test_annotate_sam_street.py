"""Masks of the default segmenter on a real street scene, against stored masks of the same model."""

import json
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate.masks import decode_mask, mask_iou
from gesso_core.annotate.pictures import open_picture
from gesso_core.annotate.segmenter.contract import Prompt, Segmenter

pytestmark = pytest.mark.slow  # as a whole

KITTI = Path(__file__).parents[4] / "shared" / "data" / "annotation" / "kitti"


@pytest.mark.skipif(not KITTI.is_dir(), reason=f"the KITTI frames are not in {KITTI}")
def test_cars_get_the_masks_of_the_exported_graph(sam_mobile: Segmenter) -> None:
    entries = json.loads((KITTI / "sam_masks" / "000008.json").read_text())["masks"]
    picture = open_picture(KITTI / "training" / "image_2" / "000008.png")
    prompts = [Prompt(box=tuple(entry["prompt"]["xyxy"])) for entry in entries]
    masks = sam_mobile.predict(sam_mobile.embed(picture), prompts)
    for entry, mask, iou in zip(entries, masks.masks_PHW, masks.predicted_iou_P, strict=True):
        want = decode_mask({"size": entry["size"], "counts": entry["counts"]})
        assert mask_iou(mask, want) > 0.99
        assert iou == pytest.approx(entry["predicted_iou"], abs=5e-3)
    assert np.count_nonzero(masks.masks_PHW.any((1, 2))) == len(entries)
