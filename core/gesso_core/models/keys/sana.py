"""Parameter names of Sana checkpoints: the diffusers folder layout, and the authors' own."""

from collections.abc import Collection

from gesso_core.models.keys.translate import KeyMap, Rule

_WB = "{p:weight|bias}"

_BLOCK_DIFFUSERS: KeyMap = (
    Rule("transformer_blocks.{i}.scale_shift_table", "blocks.{i}.table"),
    Rule(
        tuple(f"transformer_blocks.{{i}}.attn1.to_{name}.{_WB}" for name in "qkv"),
        "blocks.{i}.attention.qkv.{p}",
    ),
    Rule(
        "transformer_blocks.{i}.attn1.norm_{n:q|k}.weight", "blocks.{i}.attention.{n}_norm.weight"
    ),
    Rule(f"transformer_blocks.{{i}}.attn1.to_out.0.{_WB}", "blocks.{i}.attention.out.{p}"),
    Rule(f"transformer_blocks.{{i}}.attn2.to_q.{_WB}", "blocks.{i}.cross.q.{p}"),
    Rule(
        tuple(f"transformer_blocks.{{i}}.attn2.to_{name}.{_WB}" for name in "kv"),
        "blocks.{i}.cross.kv.{p}",
    ),
    Rule("transformer_blocks.{i}.attn2.norm_{n:q|k}.weight", "blocks.{i}.cross.{n}_norm.weight"),
    Rule(f"transformer_blocks.{{i}}.attn2.to_out.0.{_WB}", "blocks.{i}.cross.out.{p}"),
    Rule(f"transformer_blocks.{{i}}.ff.conv_inverted.{_WB}", "blocks.{i}.ffn.expand.{p}"),
    Rule(f"transformer_blocks.{{i}}.ff.conv_depth.{_WB}", "blocks.{i}.ffn.depthwise.{p}"),
    Rule("transformer_blocks.{i}.ff.conv_point.weight", "blocks.{i}.ffn.project.weight"),
)


def _diffusers(timestep_embedder: str) -> KeyMap:
    return (
        Rule(f"patch_embed.proj.{_WB}", "patch.{p}"),
        Rule(f"caption_projection.linear_1.{_WB}", "caption.hidden.{p}"),
        Rule(f"caption_projection.linear_2.{_WB}", "caption.out.{p}"),
        Rule("caption_norm.weight", "caption.norm.weight"),
        Rule(f"{timestep_embedder}.linear_1.{_WB}", "time.hidden.{p}"),
        Rule(f"{timestep_embedder}.linear_2.{_WB}", "time.out.{p}"),
        Rule(f"time_embed.guidance_embedder.linear_1.{_WB}", "guidance.hidden.{p}"),
        Rule(f"time_embed.guidance_embedder.linear_2.{_WB}", "guidance.out.{p}"),
        Rule(f"time_embed.linear.{_WB}", "modulation.{p}"),
        *_BLOCK_DIFFUSERS,
        Rule(f"proj_out.{_WB}", "head.linear.{p}"),
        Rule("scale_shift_table", "head.table"),
    )


SANA_DIFFUSERS: KeyMap = _diffusers("time_embed.emb.timestep_embedder")
SANA_SPRINT_DIFFUSERS: KeyMap = _diffusers("time_embed.timestep_embedder")

SANA_ORIGINAL: KeyMap = (
    Rule(f"x_embedder.proj.{_WB}", "patch.{p}"),
    Rule(f"y_embedder.y_proj.fc1.{_WB}", "caption.hidden.{p}"),
    Rule(f"y_embedder.y_proj.fc2.{_WB}", "caption.out.{p}"),
    Rule("attention_y_norm.weight", "caption.norm.weight"),
    Rule(f"t_embedder.mlp.0.{_WB}", "time.hidden.{p}"),
    Rule(f"t_embedder.mlp.2.{_WB}", "time.out.{p}"),
    Rule(f"cfg_embedder.mlp.0.{_WB}", "guidance.hidden.{p}"),
    Rule(f"cfg_embedder.mlp.2.{_WB}", "guidance.out.{p}"),
    Rule(f"t_block.1.{_WB}", "modulation.{p}"),
    Rule("blocks.{i}.scale_shift_table", "blocks.{i}.table"),
    Rule(f"blocks.{{i}}.attn.qkv.{_WB}", "blocks.{i}.attention.qkv.{p}"),
    Rule("blocks.{i}.attn.{n:q|k}_norm.weight", "blocks.{i}.attention.{n}_norm.weight"),
    Rule(f"blocks.{{i}}.attn.proj.{_WB}", "blocks.{i}.attention.out.{p}"),
    Rule(f"blocks.{{i}}.cross_attn.{{n:q|kv}}_linear.{_WB}", "blocks.{i}.cross.{n}.{p}"),
    Rule("blocks.{i}.cross_attn.{n:q|k}_norm.weight", "blocks.{i}.cross.{n}_norm.weight"),
    Rule(f"blocks.{{i}}.cross_attn.proj.{_WB}", "blocks.{i}.cross.out.{p}"),
    Rule(f"blocks.{{i}}.mlp.inverted_conv.conv.{_WB}", "blocks.{i}.ffn.expand.{p}"),
    Rule(f"blocks.{{i}}.mlp.depth_conv.conv.{_WB}", "blocks.{i}.ffn.depthwise.{p}"),
    Rule("blocks.{i}.mlp.point_conv.conv.weight", "blocks.{i}.ffn.project.weight"),
    Rule(f"final_layer.linear.{_WB}", "head.linear.{p}"),
    Rule("final_layer.scale_shift_table", "head.table"),
    # The position table is computed, the null caption and the variance head serve training only.
    Rule("pos_embed", None),
    Rule("y_embedder.y_embedding", None),
    Rule(f"logvar_linear.{_WB}", None),
)


def sana_keys(names: Collection[str]) -> KeyMap:
    """The table for a checkpoint with these parameter names, whichever layout it has."""
    if any(name.startswith(("x_embedder.", "y_embedder.")) for name in names):
        return SANA_ORIGINAL
    sprint = any(name.startswith("time_embed.timestep_embedder.") for name in names)
    return SANA_SPRINT_DIFFUSERS if sprint else SANA_DIFFUSERS


def sana_diffusers_keys(*, guidance_embedding: bool) -> KeyMap:
    """The table that writes a diffusers folder; Sprint names its time embedding differently."""
    return SANA_SPRINT_DIFFUSERS if guidance_embedding else SANA_DIFFUSERS
