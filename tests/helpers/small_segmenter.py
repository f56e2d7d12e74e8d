"""A segmenter of random weights, as a folder in the published layout: its masks mean nothing."""

from pathlib import Path
from typing import Any

import torch
from transformers import SamConfig, SamModel

SAM: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "mlp_dim": 32,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
        "initializer_range": 0.3,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    "initializer_range": 0.3,
}


def write_segmenter(folder: Path) -> Path:
    """A SamModel that looks at 64 px."""
    torch.manual_seed(0)
    SamModel(SamConfig(**SAM)).save_pretrained(folder)
    return folder
