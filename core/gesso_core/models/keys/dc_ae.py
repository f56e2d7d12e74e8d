"""Parameter names of DC-AE checkpoints: the diffusers layout and the authors' own.

The q, k and v of a diffusers file are the first, second and last third of one head-major tensor, so
they are stacked in that order; they are not query, key and value projections.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.models.dc_ae_config import DCAEConfig
from gesso_core.models.keys.translate import Rule, translate

Layout = Literal["diffusers", "original"]

_P = "{p:weight|bias}"
_NORM = "{n:weight|bias|running_mean|running_var}"


def dc_ae_rules(layout: Layout, config: DCAEConfig) -> tuple[Rule, ...]:
    """The key table of a layout; the authors' names depend on the configuration."""
    return diffusers_rules() if layout == "diffusers" else original_rules(config)


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """Tell the layout of a checkpoint by its decoder output norm."""
    for key, layout in _MARKS.items():
        if key in state:
            return layout
    raise WeightsError(
        f"these are not the weights of a DC-AE: none of {', '.join(_MARKS)} is among the "
        f"{len(state)} tensors; check that the right file was given"
    )


_MARKS: dict[str, Layout] = {
    "decoder.norm_out.weight": "diffusers",
    "decoder.project_out.op_list.0.weight": "original",
}


def translate_dc_ae(
    state: Mapping[str, Tensor], config: DCAEConfig, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint of either layout under our names, checked against a state dict of ours."""
    return translate(state, dc_ae_rules(layout_of(state), config), expected)


def diffusers_rules() -> tuple[Rule, ...]:
    """Names of ``diffusers.AutoencoderDC``; 1x1 projections of the attention are linear layers."""
    return (
        Rule(f"encoder.conv_in.{_P}", "encoder.project_in.{p}"),
        Rule(f"encoder.conv_in.conv.{_P}", "encoder.project_in.conv.{p}"),
        *_diffusers_blocks("encoder.down_blocks.{i}.{j}", "encoder.stages.{i}.{j}"),
        Rule(f"encoder.conv_out.{_P}", "encoder.project_out.{p}"),
        Rule(f"decoder.conv_in.{_P}", "decoder.project_in.{p}"),
        *_diffusers_blocks("decoder.up_blocks.{i}.{j}", "decoder.stages.{i}.{j}"),
        Rule(f"decoder.norm_out.{_P}", "decoder.norm_out.{p}"),
        Rule(f"decoder.conv_out.{_P}", "decoder.project_out.{p}"),
        Rule(f"decoder.conv_out.conv.{_P}", "decoder.project_out.conv.{p}"),
    )


def _diffusers_blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    attention, forward = f"{ours}.attention", f"{ours}.feed_forward"
    qkv = tuple(f"{theirs}.attn.to_{name}.weight" for name in "qkv")
    scale = f"{theirs}.attn.to_qkv_multiscale.{{s}}"
    return (
        *_residual_block(f"{theirs}.conv1", f"{theirs}.conv2", f"{theirs}.norm", ours),
        Rule(f"{theirs}.conv.{_P}", f"{ours}.conv.{{p}}"),
        Rule(qkv, f"{attention}.qkv.weight", ranks=(2, 4)),
        Rule(f"{scale}.proj_in.weight", f"{attention}.scales.{{s}}.depthwise.weight"),
        Rule(f"{scale}.proj_out.weight", f"{attention}.scales.{{s}}.mix.weight"),
        Rule(f"{theirs}.attn.to_out.weight", f"{attention}.project.weight", ranks=(2, 4)),
        *_norm(f"{theirs}.attn.norm_out", f"{attention}.norm"),
        Rule(f"{theirs}.conv_out.conv_inverted.{_P}", f"{forward}.expand.{{p}}"),
        Rule(f"{theirs}.conv_out.conv_depth.{_P}", f"{forward}.depthwise.{{p}}"),
        Rule(f"{theirs}.conv_out.conv_point.weight", f"{forward}.project.weight"),
        Rule(f"{theirs}.conv_out.norm.{_P}", f"{forward}.norm.{{p}}"),
    )


def original_rules(config: DCAEConfig) -> tuple[Rule, ...]:
    """Names of mit-han-lab/efficientvit, which wraps blocks according to the configuration."""
    down = "conv.conv" if config.downsample == "pixel_unshuffle" else "conv"
    stem = ("conv", "") if config.encoder[0].depth else (down, "conv.")
    head = ("conv", "") if config.decoder[0].depth else ("conv.conv", "conv.")
    last = "main.op_list.0" if config.encoder_out_shortcut else "op_list.0"
    first = "main.conv" if config.decoder_in_shortcut else "conv"
    block, out = "stages.{i}.op_list.{j}", "decoder.project_out.op_list"
    return (
        Rule(f"encoder.project_in.{stem[0]}.{_P}", f"encoder.project_in.{stem[1]}{{p}}"),
        *_original_blocks(f"encoder.{block}", "encoder.stages.{i}.{j}", down),
        Rule(f"encoder.project_out.{last}.conv.{_P}", "encoder.project_out.{p}"),
        Rule(f"decoder.project_in.{first}.{_P}", "decoder.project_in.{p}"),
        *_original_blocks(f"decoder.{block}", "decoder.stages.{i}.{j}", "conv.conv"),
        Rule(f"{out}.0.{_P}", "decoder.norm_out.{p}"),
        Rule(f"{out}.2.{head[0]}.{_P}", f"decoder.project_out.{head[1]}{{p}}"),
    )


def _original_blocks(theirs: str, ours: str, resample: str) -> tuple[Rule, ...]:
    main = f"{theirs}.main"
    attention = lite_mla_rules(f"{theirs}.context_module.main.", f"{ours}.attention.")
    forward = glumbconv_rules(f"{theirs}.local_module.main.", f"{ours}.feed_forward.")
    conv1, conv2, norm = f"{main}.conv1.conv", f"{main}.conv2.conv", f"{main}.conv2.norm"
    return (
        *_residual_block(conv1, conv2, norm, ours),
        Rule(f"{main}.{resample}.{_P}", f"{ours}.conv.{{p}}"),
        *attention,
        *forward,
    )


def lite_mla_rules(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """The authors' LiteMLA alone; both prefixes end with a dot or are empty."""
    return (
        Rule(f"{theirs}qkv.conv.weight", f"{ours}qkv.weight"),
        Rule(f"{theirs}aggreg.{{s}}.0.weight", f"{ours}scales.{{s}}.depthwise.weight"),
        Rule(f"{theirs}aggreg.{{s}}.1.weight", f"{ours}scales.{{s}}.mix.weight"),
        Rule(f"{theirs}proj.conv.weight", f"{ours}project.weight"),
        *_norm(f"{theirs}proj.norm", f"{ours}norm"),
    )


def glumbconv_rules(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """The authors' GLUMBConv alone; both prefixes end with a dot or are empty."""
    return (
        Rule(f"{theirs}inverted_conv.conv.{_P}", f"{ours}expand.{{p}}"),
        Rule(f"{theirs}depth_conv.conv.{_P}", f"{ours}depthwise.{{p}}"),
        Rule(f"{theirs}point_conv.conv.weight", f"{ours}project.weight"),
        Rule(f"{theirs}point_conv.norm.{_P}", f"{ours}norm.{{p}}"),
    )


def _residual_block(conv1: str, conv2: str, norm: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{conv1}.{_P}", f"{ours}.conv1.{{p}}"),
        Rule(f"{conv2}.weight", f"{ours}.conv2.weight"),
        *_norm(norm, f"{ours}.norm"),
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """RMS or batch norm; some files leave the batch counter out."""
    return (
        Rule(f"{theirs}.{_NORM}", f"{ours}.{{n}}"),
        Rule(f"{theirs}.num_batches_tracked", f"{ours}.num_batches_tracked", optional=True),
    )
