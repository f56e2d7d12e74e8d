"""Adapters of masks: run lengths, agreement, and SAM's way into its frame and back."""

import numpy as np
import torch
from gesso_core.annotate.masks import (
    area,
    box_of_mask,
    decode_mask,
    encode_mask,
    mask_runs,
    overlap,
    pooled,
)
from gesso_core.annotate.segmenter.preprocess import long_edge_frame, pixel_values
from golden_case import Adapter, Case
from torch import Tensor


def coco_rle(case: Case) -> dict[str, Tensor]:
    """The case's answers are texts: everything is compared here, in both directions."""
    for want in case.meta["expected"]:
        mask = case.inputs[f"mask_{want['index']:02}_HW"].numpy()
        code = encode_mask(mask)
        assert code == {"size": want["size"], "counts": want["counts"]}
        assert mask_runs(mask) == want["uncompressed"]
        assert area(mask) == area(code) == want["area"]
        x0, y0, x1, y1 = box_of_mask(mask)
        assert [x0, y0, x1 - x0, y1 - y0] == want["bbox"]
        for counts in (want["counts"], want["uncompressed"]):
            assert (decode_mask({"size": want["size"], "counts": counts}) == mask).all()
    return {}


def mask_metrics(case: Case) -> dict[str, Tensor]:
    predicted, true = case.inputs["pred_NHW"].numpy(), case.inputs["gt_NHW"].numpy()
    pictures = [overlap(p, t) for p, t in zip(predicted, true, strict=True)]
    whole = pooled(pictures)
    return {
        "dataset_fgiou": torch.tensor([whole.iou], dtype=torch.float64),
        "dataset_f": torch.tensor([whole.f], dtype=torch.float64),
        "dataset_precision": torch.tensor([whole.precision], dtype=torch.float64),
        "dataset_recall": torch.tensor([whole.recall], dtype=torch.float64),
        "image_fgiou_N": torch.tensor([p.iou for p in pictures], dtype=torch.float64),
        "image_f_N": torch.tensor([p.f for p in pictures], dtype=torch.float64),
    }


def sam_preprocess(case: Case) -> dict[str, Tensor]:
    options = case.meta["constructor"]
    assert options["pad_to"] == [options["longest_edge"]] * 2
    assert np.isclose(options["rescale"], 1 / 255)
    produced = {}
    for name, image in case.inputs.items():
        if not name.startswith("image_"):
            continue
        number = name.split("_")[1]
        frame = long_edge_frame(tuple(image.shape[:2]), options["longest_edge"])
        pixels = pixel_values(image.numpy(), frame, tuple(options["mean"]), tuple(options["std"]))
        points, boxes = case.inputs[f"points_{number}_N2"], case.inputs[f"boxes_{number}_M4"]
        produced[f"pixel_values_{number}_3EE"] = torch.from_numpy(pixels)
        produced[f"points_{number}_N2"] = torch.from_numpy(frame.points(points.numpy()))
        produced[f"boxes_{number}_M4"] = torch.from_numpy(frame.boxes(boxes.numpy()))
        produced[f"resized_size_{number}_2"] = torch.tensor(frame.resized)
    return produced


def sam_postprocess(case: Case) -> dict[str, Tensor]:
    options = case.meta["constructor"]
    produced = {}
    for name, low_res in case.inputs.items():
        if not name.startswith("low_res_logits_"):
            continue
        number = name.split("_")[3]
        size = tuple(case.inputs[f"original_size_{number}_2"].tolist())
        logits = long_edge_frame(size, options["longest_edge"]).picture_logits(low_res[0])
        produced[f"logits_{number}_13HW"] = logits[None]
        produced[f"mask_{number}_13HW"] = logits[None] > options["mask_threshold"]
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("annotation", "coco_rle"): coco_rle,
    ("annotation", "mask_metrics"): mask_metrics,
    ("annotation", "sam_preprocess"): sam_preprocess,
    ("annotation", "sam_postprocess"): sam_postprocess,
}
