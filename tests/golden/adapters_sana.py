"""Adapters of the Sana cases: the denoiser in both layouts, and its parts."""

import re
from typing import Any

import torch.nn.functional as F
from gesso_core.layers.attention import ReLULinearAttention
from gesso_core.layers.embeddings import sincos_table, timestep_sinusoid
from gesso_core.layers.mix_ffn import MixFFN
from gesso_core.models.keys.sana import SANA_ORIGINAL, sana_keys
from gesso_core.models.keys.translate import Rule, translate
from gesso_core.models.sana import Sana, SanaConfig
from golden_case import Adapter, Case
from torch import Tensor, nn

WB = "{p:weight|bias}"


def loaded(module: nn.Module, case: Case, rules: Any) -> nn.Module:
    module.load_state_dict(translate(case.state, rules, expected=module.state_dict()))
    return module.eval()


def transformer(case: Case) -> dict[str, Tensor]:
    """The whole model; what the case does not ask for is left out."""
    model = Sana(SanaConfig.from_diffusers(case.meta["constructor"]))
    rules = SANA_ORIGINAL if case.meta["layout"] == "original" else sana_keys(case.state)
    loaded(model, case, rules)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    for number, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{number}"))
    model.modulation.register_forward_hook(keep("t_block"))
    model.blocks[0].register_forward_pre_hook(
        lambda module, args: seen.__setitem__("patch_tokens", args[0])
    )
    model.head.register_forward_pre_hook(lambda module, args: seen.__setitem__("t_emb", args[1]))
    given = case.inputs
    seen["sample"] = model(
        given["latent"],
        given["timestep"],
        given["encoder_hidden_states"],
        given.get("encoder_attention_mask"),
        given.get("guidance"),
    )
    seen["caption_tokens"] = model.caption(given["encoder_hidden_states"])
    return {name: seen[name] for name in case.outputs}


def linear_attention(case: Case) -> dict[str, Tensor]:
    """Self-attention with its output projection."""
    options = case.meta["constructor"]
    module = ReLULinearAttention(
        options["query_dim"],
        options["dim_head"],
        qk_norm=options["qk_norm"] is not None,
        bias=options["bias"],
    )
    rules = [
        Rule(tuple(f"to_{name}.{WB}" for name in "qkv"), "qkv.{p}"),
        Rule("norm_{n:q|k}.weight", "{n}_norm.weight"),
        Rule(f"to_out.0.{WB}", "out.{p}"),
        Rule(f"qkv.{WB}", "qkv.{p}"),
        Rule("{n:q|k}_norm.weight", "{n}_norm.weight"),
        Rule(f"proj.{WB}", "out.{p}"),
    ]
    return {"y": loaded(module, case, rules)(case.inputs["x"])}


def mix_ffn(case: Case) -> dict[str, Tensor]:
    """The feed-forward network on an image; norm and residual belong to the caller."""
    options = case.meta["constructor"]
    width_in, width_out = options["in_channels"], options["out_channels"]
    module = MixFFN(width_in, int(options["expand_ratio"] * width_in), width_out)
    rules = [
        Rule(f"conv_inverted.{WB}", "expand.{p}"),
        Rule(f"conv_depth.{WB}", "depthwise.{p}"),
        Rule("conv_point.weight", "project.weight"),
        Rule(f"inverted_conv.conv.{WB}", "expand.{p}"),
        Rule(f"depth_conv.conv.{WB}", "depthwise.{p}"),
        Rule("point_conv.conv.weight", "project.weight"),
        Rule(f"norm.{WB}", None),
    ]
    loaded(module, case, rules)
    x_BCHW = case.inputs["x"]
    height, width = x_BCHW.shape[-2:]
    y_BND = module(x_BCHW.flatten(2).mT.contiguous(), height, width)
    if options.get("norm_type") is not None:
        y_BND = F.rms_norm(y_BND, (width_out,), case.state["norm.weight"], 1e-5)
        y_BND = y_BND + case.state.get("norm.bias", 0)
    y_BCHW = y_BND.mT.unflatten(2, (height, width))
    return {"y": y_BCHW + x_BCHW if options.get("residual_connection") else y_BCHW}


def sincos(case: Case) -> dict[str, Tensor]:
    """The parameters of each table are in its name, e.g. ``grid4x6_base4_scale2``."""
    produced = {}
    for name in case.outputs:
        found = re.fullmatch(r"grid(\d+)x(\d+)_base(\d+)_scale(\d+(?:[.p_]\d+)?)", name)
        assert found, f"a table name that this adapter cannot read: {name}"
        rows, columns, base = (int(part) for part in found.groups()[:3])
        produced[name] = sincos_table(
            case.meta["constructor"]["embed_dim"],
            rows,
            columns,
            base=base,
            scale=float(re.sub("[p_]", ".", found[4])),
        )
    return produced


def timesteps(case: Case) -> dict[str, Tensor]:
    """Fourier features of the time."""
    options = case.meta["constructor"]
    time = case.inputs["timestep"].float() * options.get("scale", 1)
    embedding = timestep_sinusoid(
        time,
        options["embedding_dim"],
        cos_first=options.get("flip_sin_to_cos", False),
        max_period=options.get("max_period", 10_000),
        frequency_shift=options.get("downscale_freq_shift", 1),
    )
    return dict.fromkeys(case.outputs, embedding)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("sana", "transformer"): transformer,
    ("sana", "linear_attention"): linear_attention,
    ("sana", "mix_ffn"): mix_ffn,
    ("sana", "sincos_table"): sincos,
    ("sana", "timestep_sinusoid"): timesteps,
}
