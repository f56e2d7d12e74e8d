"""How each kind of HART tokenizer case is replayed with our modules."""

from typing import Any

import torch.nn.functional as F
from gesso_core.hub.load_hart_tokenizer import TokenizerParts
from gesso_core.layers.vqgan import Decoder, Encoder
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.tokenizer_losses import tokenizer_pass
from gesso_core.models.keys.hart_tokenizer import DECODER, ENCODER, quantizer_keys, tokenizer_keys
from gesso_core.models.keys.translate import translate
from golden_case import Adapter, Case
from torch import Tensor


def quantizer_of(v: dict[str, Any], state: dict[str, Tensor]) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(
        vocabulary=v["vocab_size"],
        channels=v["Cvae"],
        scales=tuple(v["v_patch_nums"]),
        phi_ratio=v["quant_resi"],
        phi_sharing=v["share_quant_resi"],
        cosine=v["using_znorm"],
        beta=v.get("beta", 0.25),
    )
    rules = quantizer_keys(v["share_quant_resi"])
    quantizer.load_state_dict(translate(state, rules, quantizer.state_dict()))
    return quantizer.eval()


def numbered(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{k:02}": tensor for k, tensor in enumerate(tensors)}


def training_forward(
    quantizer: MultiScaleQuantizer, f: Tensor, name: str, *, discrete: bool
) -> dict[str, Tensor]:
    done = quantizer.quantize(f, discrete=discrete)
    return {
        f"{name}.f_hat": done.latent_BCHW.detach(),
        f"{name}.vq_loss": done.vq_loss.detach()[None],
        f"{name}.usage_percent": 100 * done.used_share[None],
    }


def var_quantizer(case: Case) -> dict[str, Tensor]:
    produced: dict[str, Tensor] = {}
    f = case.inputs["f"]
    for v in case.meta["constructor"]:
        name = v["name"]
        prefix = f"{name}."
        state = {k.removeprefix(prefix): t for k, t in case.state.items() if k.startswith(prefix)}
        quantizer = quantizer_of(v, state)
        indices = quantizer.encode(f)
        produced |= numbered(f"{name}.idx", indices)
        produced[f"{name}.f_hat"] = quantizer.decode(indices, phi_at_last=True).detach()
        produced |= training_forward(quantizer, f, f"{name}.forward", discrete=True)
    return produced


def growing_sum(quantizer: MultiScaleQuantizer, indices: list[Tensor]) -> Tensor:
    """The original's other way to decode: the sum itself grows from scale to scale."""
    total: Tensor | None = None
    for scale, (side, indices_BN) in enumerate(zip(quantizer.scales, indices, strict=True)):
        h = as_map(quantizer.embed(indices_BN).mT)
        h = quantizer._phi(scale, h)
        total = h if total is None else h + F.interpolate(total, size=(side, side), mode="bicubic")
    assert total is not None
    return total


def hybrid_quantizer(case: Case) -> dict[str, Tensor]:
    quantizer, f = quantizer_of(case.meta["constructor"], case.state), case.inputs["f"]
    codes, plain = quantizer.encode_hybrid(f), quantizer.encode(f)
    plain_sums = quantizer.partial_sums(plain, phi_at_last=True)
    sums = quantizer.partial_sums(codes.indices, phi_at_last=False)
    steps = [
        quantizer.next_input(total, min(k + 1, len(sums) - 1)).mT for k, total in enumerate(sums)
    ]
    produced = {
        **numbered("encode.idx", codes.indices),
        "encode.f_rest_before_last_discrete_BLC": codes.rest_BNC,
        **numbered("encode_var.idx", plain),
        "encode_var.f_hat_00": plain_sums[0],
        "encode_var.f_hat_last": plain_sums[-1],
        **numbered("decode.f_hat", quantizer.partial_sums(codes.indices, phi_at_last=True)),
        "decode.f_hat_not_to_max_scale_last": growing_sum(quantizer, codes.indices),
        "teacher.var_input_BLC": quantizer.teacher_inputs(codes.indices),
        **numbered("infer.next_input", [as_map(step) for step in steps]),
        "infer.f_hat_final": sums[-1],
        **{
            f"forward.{name}_flat": i.flatten()
            for name, i in numbered("idx", quantizer.quantize(f).indices).items()
        },
        **training_forward(quantizer, f, "forward_discrete", discrete=True),
        **training_forward(quantizer, f, "forward_continuous", discrete=False),
    }
    return {name: tensor.detach() for name, tensor in produced.items() if name in case.outputs}


def as_map(rows_BCN: Tensor) -> Tensor:
    side = round(rows_BCN.shape[2] ** 0.5)
    return rows_BCN.reshape(*rows_BCN.shape[:2], side, side)


def one_side(case: Case) -> dict[str, Tensor]:
    v = case.meta["constructor"]
    kind, rules = {"encoder": (Encoder, ENCODER), "decoder": (Decoder, DECODER)}[case.key[1]]
    levels = len(v["ch_mult"])
    module = kind(
        width=v["ch"],
        multipliers=v["ch_mult"],
        blocks=v["num_res_blocks"],
        latent_channels=v["z_channels"] * (2 if v.get("double_z") else 1),
        attend=[v["using_sa"] and level == levels - 1 for level in range(levels)],
        middle_attention=v["using_mid_sa"],
        image_channels=v.get("in_channels", 3),
        dropout=v.get("dropout", 0.0),
    )
    module.load_state_dict(translate(case.state, rules, module.state_dict()))
    return {"y": module.eval()(case.inputs["x"]).detach()}


def autoencoder(case: Case) -> dict[str, Tensor]:
    v = case.meta["constructor"]
    inside = v["fixed_inside"]
    assert (inside["using_sa"], inside["using_mid_sa"], inside["double_z"]) == (True, True, False)
    config = HARTTokenizerConfig.from_original(
        {
            **{k: x for k, x in v.items() if k != "fixed_inside"},
            "num_res_blocks": inside["num_res_blocks"],
        }
    )
    parts = TokenizerParts(config)
    state = {f"vae.{name}": tensor for name, tensor in case.state.items()}
    rules = tokenizer_keys(config.phi_sharing)
    parts.load_state_dict(translate(state, rules, parts.state_dict()))
    model, quantizer, x = parts.eval().autoencoder, parts.quantizer, case.inputs["image"]
    assert model is not None
    f = model.encode(x)
    codes = quantizer.encode_hybrid(f)
    sums = quantizer.partial_sums(codes.indices, phi_at_last=False)
    continuous = sums[-2] + as_map(codes.rest_BNC.mT)
    discrete = quantizer.decode(codes.indices, phi_at_last=True)
    passes = {
        name: tokenizer_pass(model, quantizer, x, discrete=name == "discrete")
        for name in ("discrete", "continuous")
    }
    produced = {
        "encoder.z": model.encoder(x),
        "quant_conv.f": f,
        **numbered("idx", codes.indices),
        "f_rest": codes.rest_BNC,
        "f_hat_discrete": discrete,
        "decoder.raw_continuous": model.reconstruct(continuous),
        "img_discrete": model.decode(discrete),
        "img_continuous": model.decode(continuous),
        "img_to_reconstructed_img_last": model.decode(
            quantizer.decode(quantizer.encode(f), phi_at_last=True)
        ),
        **{f"forward_{name}.out": done.picture_BCHW for name, done in passes.items()},
        **{f"forward_{name}.vq_loss": done.vq_loss[None] for name, done in passes.items()},
    }
    return {name: tensor.detach() for name, tensor in produced.items() if name in case.outputs}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("hart", "autoencoder"): autoencoder,
    ("hart", "encoder"): one_side,
    ("hart", "decoder"): one_side,
    ("hart", "hybrid_quantizer"): hybrid_quantizer,
    ("hart", "var_quantizer"): var_quantizer,
}
