"""How each kind of DC-AE case is replayed with our modules."""

import re
from functools import partial
from typing import Any

import torch
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_blocks import (
    GLUMBConv,
    LiteMLA,
    RMSNorm2d,
    channel_average,
    channel_duplicate,
    multi_head_relu_attention,
)
from gesso_core.models.dc_ae_config import DCAEConfig
from gesso_core.models.dc_ae_tiling import Tiling, decode_tiled, encode_tiled
from gesso_core.models.keys.dc_ae import dc_ae_rules, glumbconv_rules, lite_mla_rules
from gesso_core.models.keys.translate import translate
from gesso_kernels.relu_linear_attention import (
    relu_linear_attention_ref,
    relu_quadratic_attention_ref,
)
from golden_case import Adapter, Case
from torch import Tensor, nn


def filled(module: nn.Module, state: dict[str, Tensor]) -> Any:
    module.load_state_dict(state)
    return module.eval()


def autoencoder_of(case: Case) -> DCAE:
    constructor, layout = case.meta["constructor"], case.meta["layout"]
    config = (
        DCAEConfig.from_diffusers(constructor)
        if layout == "diffusers"
        else DCAEConfig.from_original(constructor["parsed"])
    )
    model = DCAE(config)
    rules = dc_ae_rules(layout, config)
    return filled(model, translate(case.state, rules, model.state_dict()))


def autoencoder(case: Case) -> dict[str, Tensor]:
    """Latents and reconstructions of every ``image*``, the picture of every ``latent*``."""
    model = autoencoder_of(case)
    produced: dict[str, Tensor] = {}
    for name, x in case.inputs.items():
        if name.startswith("latent"):
            produced[name.replace("latent", "decode")] = model.decode(x)
            continue
        suffix = name.removeprefix("image")
        latent = model.encode(x)
        produced |= {f"latent{suffix}": latent, f"recon{suffix}": model.decode(latent)}
        produced |= {f"{key}{suffix}": y for key, y in encoder_activations(model, x[:1]).items()}
    return {name: y for name, y in produced.items() if name in case.outputs}


def encoder_activations(model: DCAE, x: Tensor) -> dict[str, Tensor]:
    x = model.encoder.project_in(x)
    seen = {"enc_project_in": x}
    for index, stage in enumerate(model.encoder.stages):
        x = stage(x)
        seen[f"enc_stage{index}"] = x
    return seen


def tiled_autoencoder(case: Case) -> dict[str, Tensor]:
    constructor = case.meta["constructor"]
    found = re.fullmatch(r"identical to case (\w+)", constructor["weights"])
    assert found, constructor["weights"]
    model = autoencoder_of(case.sibling(found[1]))

    def size(what: str) -> tuple[int, int]:
        return constructor[f"tile_sample_{what}_height"], constructor[f"tile_sample_{what}_width"]

    tiling = Tiling(tile=size("min"), stride=size("stride"), last="short")
    image = case.inputs["image"]
    latent = encode_tiled(model, image, tiling)
    return {
        "latent_full": model.encode(image),
        "latent_tiled": latent,
        "recon_full": model.decode(latent),
        "recon_tiled": decode_tiled(model, latent, tiling),
    }


def lite_mla(case: Case) -> dict[str, Tensor]:
    v = case.meta["constructor"]
    attention = LiteMLA(v["in_channels"], v["dim"], v["scales"])
    filled(attention, translate(case.state, lite_mla_rules(), attention.state_dict()))
    x = case.inputs["x"]
    return {"qkv": attention.qkv(x), "y": attention(x)}


def glumbconv(case: Case) -> dict[str, Tensor]:
    v = case.meta["constructor"]
    block = GLUMBConv(v["in_channels"], v["expand_ratio"])
    filled(block, translate(case.state, glumbconv_rules(), block.state_dict()))
    return {"y": block(case.inputs["x"])}


def relu_attention(case: Case) -> dict[str, Tensor]:
    v, qkv = case.meta["constructor"], case.inputs["qkv"]
    forms = {"linear": relu_linear_attention_ref, "quadratic": relu_quadratic_attention_ref}
    run = partial(multi_head_relu_attention, qkv, v["dim"], v["eps"])
    produced = {name: run(attention=form) for name, form in forms.items()}
    torch.testing.assert_close(run(), produced["linear"], atol=1e-5, rtol=1e-4)
    return produced


def rms_norm_2d(case: Case) -> dict[str, Tensor]:
    v = case.meta["constructor"]
    return {"y": filled(RMSNorm2d(v["normalized_shape"], v["eps"]), case.state)(case.inputs["x"])}


def shortcut_ops(case: Case) -> dict[str, Tensor]:
    operations = {"down": channel_average, "up": channel_duplicate}
    return {
        name: operations[name.partition("_")[0]](case.inputs["x"], channels, factor)
        for name, (_, channels, factor) in case.meta["constructor"].items()
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("dc_ae", "autoencoder"): autoencoder,
    ("dc_ae", "tiled_autoencoder"): tiled_autoencoder,
    ("dc_ae", "lite_mla"): lite_mla,
    ("dc_ae", "relu_attention"): relu_attention,
    ("dc_ae", "glumbconv"): glumbconv,
    ("dc_ae", "rms_norm_2d"): rms_norm_2d,
    ("dc_ae", "shortcut_ops"): shortcut_ops,
}
