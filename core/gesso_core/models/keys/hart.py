"""Parameter names of HART's transformer as published (folder ``llm``)."""

from gesso_core.models.keys.translate import KeyMap, Rule

_WB = "{p:weight|bias}"

HART_BLOCK: KeyMap = (
    Rule("ln_wo_grad.weight", "norm.weight"),
    Rule("attn.qkv_proj.weight", "attention.qkv.weight"),
    Rule("attn.{n:q|v}_bias", "attention.{n}_bias"),
    Rule("attn.zero_k_bias", None),
    Rule("attn.scale_mul_1H11", "attention.log_scale"),
    Rule(f"attn.proj.{_WB}", "attention.out.{p}"),
    Rule("ffn.{n:gate|up|down}_proj.weight", "mlp.{n}.weight"),
    Rule(f"ada_lin.1.{_WB}", "modulation.{p}"),
    Rule("scale_shift_table", "table"),
)

HART_RESIDUAL: KeyMap = (
    Rule(f"net.input_proj.{_WB}", "net.input.{p}"),
    Rule(f"net.cond_embed.{_WB}", "net.condition.{p}"),
    Rule(f"net.time_embed.mlp.0.{_WB}", "net.time.hidden.{p}"),
    Rule(f"net.time_embed.mlp.2.{_WB}", "net.time.out.{p}"),
    Rule(f"net.res_blocks.{{i}}.in_ln.{_WB}", "net.blocks.{i}.norm.{p}"),
    Rule(f"net.res_blocks.{{i}}.mlp.0.{_WB}", "net.blocks.{i}.hidden.{p}"),
    Rule(f"net.res_blocks.{{i}}.mlp.2.{_WB}", "net.blocks.{i}.out.{p}"),
    Rule(f"net.res_blocks.{{i}}.adaLN_modulation.1.{_WB}", "net.blocks.{i}.modulation.{p}"),
    Rule(f"net.final_layer.adaLN_modulation.1.{_WB}", "net.head_modulation.{p}"),
    Rule(f"net.final_layer.linear.{_WB}", "net.head.{p}"),
)


def _below(prefix: str, ours: str, rules: KeyMap) -> KeyMap:
    """The rules of a part, under the name that it has in the whole."""
    return tuple(
        Rule(f"{prefix}.{rule.foreign}", None if rule.ours is None else f"{ours}.{rule.ours}")
        for rule in rules
    )


# Recomputed from the scales; the mask is 380 MB at 1024 pixels and is not even read.
HART_BUFFERS = ("lvl_1L", "attn_bias_for_masking")

HART_ORIGINAL: KeyMap = (
    Rule(f"word_embed.{_WB}", "word_embed.{p}"),
    Rule("context_norm.weight", "context_norm.weight"),
    Rule(f"context_embed.{_WB}", "context_embed.{p}"),
    Rule(f"lvl_embed.mlp.0.{_WB}", "level_embed.hidden.{p}"),
    Rule(f"lvl_embed.mlp.2.{_WB}", "level_embed.out.{p}"),
    Rule("lvl_embed.weight", "level_embed.weight"),
    *_below("blocks.{i}", "blocks.{i}", HART_BLOCK),
    Rule(f"head_nm.ada_lin.1.{_WB}", "head_modulation.{p}"),
    Rule("head_nm.ln_wo_grad.weight", "head_norm.weight"),
    Rule(f"head.{_WB}", "head.{p}"),
    Rule("decoder_norm.weight", "decoder_norm.weight"),
    *_below("diffloss", "residual", HART_RESIDUAL),
    *(Rule(name, None) for name in HART_BUFFERS),
)
