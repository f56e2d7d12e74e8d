"""Segmenters, the real one and small ones of random weights, and a street that is made once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gesso_core.annotate import fetch
from gesso_core.annotate.segmenter.contract import Segmenter
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.annotate.slf.synthetic import SyntheticFrame, synthetic_frames
from gesso_core.hub.store import DEFAULT_STORE
from small_segmenter import write_segmenter

SAM2: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "num_attention_heads": 1,
            "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [4, 2, 4, 2],
            "window_positional_embedding_background_size": [4, 4],
            "global_attention_blocks": [3],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "iou_head_hidden_dim": 32,
        # An unstable single mask, as random weights give it, would become the best proposal.
        "dynamic_multimask_via_stability": False,
    },
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SamModel of random weights, as it is published."""
    return write_segmenter(tmp_path_factory.mktemp("models") / "sam")


@pytest.fixture(scope="session")
def sam2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Sam2Model of random weights, as it is published."""
    from transformers import Sam2Config, Sam2Model

    folder = tmp_path_factory.mktemp("models") / "sam2"
    torch.manual_seed(0)
    Sam2Model(Sam2Config(**SAM2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sam_mobile_folder() -> Path:
    """The two real ONNX files."""
    folder = DEFAULT_STORE / fetch.MODEL
    if not all((folder / name).is_file() for name in fetch.SHA256):
        pytest.skip(f"{folder} lacks the real model; run `make models`")
    return folder


@pytest.fixture(scope="session")
def frame() -> SyntheticFrame:
    """A street with cars that the prior has not seen."""
    return next(synthetic_frames(1))


@pytest.fixture(scope="session")
def sam_mobile(sam_mobile_folder: Path) -> Segmenter:
    """The real default segmenter."""
    return load_segmenter(sam_mobile_folder)
