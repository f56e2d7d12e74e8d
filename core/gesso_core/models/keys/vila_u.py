"""Parameter names of VILA-U's depth transformer; the language model keeps those of transformers."""

from gesso_core.models.keys.translate import KeyMap, Rule

_WB = "{p:weight|bias}"
_BLOCK = "head_transformer.blocks.{i}"

DEPTH_TRANSFORMER: KeyMap = (
    Rule(f"in_mlp_1.{_WB}", "from_codes.{p}"),
    Rule(f"in_mlp_2.{_WB}", "from_state.{p}"),
    Rule("pos_emb_d", "position_1DE"),
    Rule(f"{_BLOCK}.ln{{n:1|2}}.{_WB}", "blocks.{i}.norm{n}.{p}"),
    Rule(
        tuple(f"{_BLOCK}.attn.{name}.{_WB}" for name in ("query", "key", "value")),
        "blocks.{i}.qkv.{p}",
    ),
    Rule(f"{_BLOCK}.attn.proj.{_WB}", "blocks.{i}.out.{p}"),
    Rule(f"{_BLOCK}.mlp.0.{_WB}", "blocks.{i}.expand.{p}"),
    Rule(f"{_BLOCK}.mlp.2.{_WB}", "blocks.{i}.project.{p}"),
    Rule(f"classifier_mlp.layer_norm.{_WB}", "norm.{p}"),
    Rule(f"classifier_mlp.linear.{_WB}", "classifier.{p}"),
)
