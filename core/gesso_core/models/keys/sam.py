"""Parameter names of SAM's prompt encoder and mask decoder: the authors', and transformers'."""

from gesso_core.models.keys.translate import KeyMap, Rule

_WB = "{p:weight|bias}"
_PROJECTION = f"{{x:q|k|v|out}}_proj.{_WB}"


def _attention(foreign: str, ours: str) -> Rule:
    return Rule(f"{foreign}.{_PROJECTION}", f"{ours}.{{x}}.{{p}}")


def _blocks(norm: str) -> tuple[Rule, ...]:
    """Both blocks of the decoder; only the norms are called differently."""
    rules = []
    for number in range(2):
        foreign, ours = f"mask_decoder.transformer.layers.{number}", f"block{number + 1}"
        rules += [
            _attention(f"{foreign}.self_attn", f"{ours}.among_tokens"),
            _attention(f"{foreign}.cross_attn_token_to_image", f"{ours}.of_picture"),
            _attention(f"{foreign}.cross_attn_image_to_token", f"{ours}.into_picture"),
            Rule(f"{foreign}.{norm}{{n}}.{_WB}", f"{ours}.norm{{n}}.{{p}}"),
            Rule(f"{foreign}.mlp.lin1.{_WB}", f"{ours}.mlp_in.{{p}}"),
            Rule(f"{foreign}.mlp.lin2.{_WB}", f"{ours}.mlp_out.{{p}}"),
        ]
    return tuple(rules)


SAM_ORIGINAL: KeyMap = (
    Rule("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompts.frequencies"),
    Rule(
        (
            "prompt_encoder.not_a_point_embed.weight",
            "prompt_encoder.point_embeddings.0.weight",
            "prompt_encoder.point_embeddings.1.weight",
            "prompt_encoder.point_embeddings.2.weight",
            "prompt_encoder.point_embeddings.3.weight",
        ),
        "prompts.kinds",
    ),
    Rule("prompt_encoder.no_mask_embed.weight", "prompts.no_mask"),
    Rule(f"prompt_encoder.mask_downscaling.0.{_WB}", "prompts.mask1.{p}"),
    Rule(f"prompt_encoder.mask_downscaling.1.{_WB}", "prompts.mask_norm1.{p}"),
    Rule(f"prompt_encoder.mask_downscaling.3.{_WB}", "prompts.mask2.{p}"),
    Rule(f"prompt_encoder.mask_downscaling.4.{_WB}", "prompts.mask_norm2.{p}"),
    Rule(f"prompt_encoder.mask_downscaling.6.{_WB}", "prompts.mask3.{p}"),
    Rule("mask_decoder.iou_token.weight", "iou_token"),
    Rule("mask_decoder.mask_tokens.weight", "mask_tokens"),
    *_blocks("norm"),
    _attention("mask_decoder.transformer.final_attn_token_to_image", "last_look"),
    Rule(f"mask_decoder.transformer.norm_final_attn.{_WB}", "last_norm.{p}"),
    Rule(f"mask_decoder.output_upscaling.0.{_WB}", "up1.{p}"),
    Rule(f"mask_decoder.output_upscaling.1.{_WB}", "up_norm.{p}"),
    Rule(f"mask_decoder.output_upscaling.3.{_WB}", "up2.{p}"),
    Rule(
        f"mask_decoder.output_hypernetworks_mlps.{{i}}.layers.{{j}}.{_WB}",
        "mask_heads.{i}.layers.{j}.{p}",
    ),
    Rule(f"mask_decoder.iou_prediction_head.layers.{{j}}.{_WB}", "iou_head.layers.{j}.{p}"),
)

SAM_TRANSFORMERS: KeyMap = (
    Rule("prompt_encoder.shared_embedding.positional_embedding", "prompts.frequencies"),
    Rule(
        (
            "prompt_encoder.not_a_point_embed.weight",
            "prompt_encoder.point_embed.0.weight",
            "prompt_encoder.point_embed.1.weight",
            "prompt_encoder.point_embed.2.weight",
            "prompt_encoder.point_embed.3.weight",
        ),
        "prompts.kinds",
    ),
    Rule("prompt_encoder.no_mask_embed.weight", "prompts.no_mask"),
    Rule(f"prompt_encoder.mask_embed.conv{{n}}.{_WB}", "prompts.mask{n}.{p}"),
    Rule(f"prompt_encoder.mask_embed.layer_norm{{n}}.{_WB}", "prompts.mask_norm{n}.{p}"),
    Rule("mask_decoder.iou_token.weight", "iou_token"),
    Rule("mask_decoder.mask_tokens.weight", "mask_tokens"),
    *_blocks("layer_norm"),
    _attention("mask_decoder.transformer.final_attn_token_to_image", "last_look"),
    Rule(f"mask_decoder.transformer.layer_norm_final_attn.{_WB}", "last_norm.{p}"),
    Rule(f"mask_decoder.upscale_conv{{n}}.{_WB}", "up{n}.{p}"),
    Rule(f"mask_decoder.upscale_layer_norm.{_WB}", "up_norm.{p}"),
    Rule(
        f"mask_decoder.output_hypernetworks_mlps.{{i}}.proj_in.{_WB}", "mask_heads.{i}.layers.0.{p}"
    ),
    Rule(
        f"mask_decoder.output_hypernetworks_mlps.{{i}}.layers.0.{_WB}",
        "mask_heads.{i}.layers.1.{p}",
    ),
    Rule(
        f"mask_decoder.output_hypernetworks_mlps.{{i}}.proj_out.{_WB}",
        "mask_heads.{i}.layers.2.{p}",
    ),
    Rule(f"mask_decoder.iou_prediction_head.proj_in.{_WB}", "iou_head.layers.0.{p}"),
    Rule(f"mask_decoder.iou_prediction_head.layers.0.{_WB}", "iou_head.layers.1.{p}"),
    Rule(f"mask_decoder.iou_prediction_head.proj_out.{_WB}", "iou_head.layers.2.{p}"),
)
