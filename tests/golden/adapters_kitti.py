"""Adapters of the KITTI cases: projection, boxes, overlap, evaluation, the distance grid."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gesso_core.annotate.kitti import boxes
from gesso_core.annotate.kitti.calibration import parse_calibration
from gesso_core.annotate.kitti.evaluation import AveragePrecision, Metric, evaluate
from gesso_core.annotate.kitti.labels import parse_labels
from gesso_core.annotate.slf.sdf import Grid, Pose, object_from_camera, sample
from golden_case import Adapter, Case
from torch import Tensor


def tensors(**arrays: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def kitti_projection(case: Case) -> dict[str, Tensor]:
    calibration = parse_calibration(case.meta["texts"]["calib.txt"])
    rect = calibration.rect_from_velo(case.inputs["points_lidar_N4"].numpy())
    uv, depth = calibration.project(rect)
    width, height = case.meta["call"]["image_width"], case.meta["call"]["image_height"]
    inside = calibration.in_image(rect, width, height)
    return tensors(points_rect_N3=rect, uv_N2=uv, depth_N=depth, in_image_N=inside)


def box_corners(case: Case) -> dict[str, Tensor]:
    calibration = parse_calibration(case.meta["texts"]["calib.txt"])
    given = case.inputs["boxes_N7"].numpy()
    return tensors(
        corners_N83=boxes.corners(given),
        corners_uv_N82=boxes.projected_corners(given, calibration),
        amodal_box_N4=boxes.projected_box(given, calibration),
        alpha_N=boxes.observation_angle(given),
    )


def points_in_box(case: Case) -> dict[str, Tensor]:
    points, given = case.inputs["points_rect_N3"].numpy(), case.inputs["boxes_M7"].numpy()
    return tensors(inside_NM=boxes.points_in_boxes(points, given))


def rotated_iou(case: Case) -> dict[str, Tensor]:
    a, b = case.inputs["boxes_a_N7"].numpy(), case.inputs["boxes_b_M7"].numpy()
    return tensors(iou_bev_NM=boxes.bev_iou(a, b), iou_3d_NM=boxes.iou_3d(a, b))


def kitti_ap40(case: Case) -> dict[str, Tensor]:
    """Outputs are named ``<score>.iou<car threshold>.<class>.<metric>``."""
    texts, call = case.meta["texts"], case.meta["call"]
    names = sorted(Path(name).name for name in texts if name.startswith("gt/"))
    truths, detections = (
        [parse_labels(texts.get(f"{side}/{name}", "")) for name in names] for side in ("gt", "det")
    )

    @cache
    def scores(kind: str, metric: Metric, overlap: float) -> tuple[AveragePrecision, ...]:
        return evaluate(truths, detections, kind=kind, metric=metric, min_overlap=overlap)

    outputs = {}
    for name in case.outputs:
        score, threshold, kind, metric = name.replace("iou0.", "iou0_").split(".")
        overlap = call["min_overlap_pedestrian_cyclist"]
        if kind == "car":
            overlap = call["min_overlap_car"][threshold.removeprefix("iou").replace("_", ".")]
        field = "aos40" if metric == "aos" else score
        rows = scores(kind, "image" if metric == "aos" else metric, overlap)
        outputs[name] = torch.tensor([getattr(row, field) for row in rows], dtype=torch.float64)
    return outputs


def sdf_query(case: Case) -> dict[str, Tensor]:
    voxel = case.meta["call"]["voxel_size_m"]
    grid = Grid(case.inputs["sdf_XYZ"].double(), case.inputs["origin_3"], voxel)
    pose = Pose.from_rows(case.inputs["pose_4"][None])
    points = object_from_camera(case.inputs["points_rect_N3"][None], pose)
    return {"points_canonical_N3": points[0], "sdf_N": sample(grid, points)[0]}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("annotation", "kitti_projection"): kitti_projection,
    ("annotation", "box_corners"): box_corners,
    ("annotation", "points_in_box"): points_in_box,
    ("annotation", "rotated_iou"): rotated_iou,
    ("annotation", "kitti_ap40"): kitti_ap40,
    ("annotation", "sdf_query"): sdf_query,
}
