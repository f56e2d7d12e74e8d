"""How each kind of case about VILA-U's vision tower is replayed with our modules."""

from typing import Any

from gesso_core.models.keys.translate import translate
from gesso_core.models.keys.vila_u_tower import (
    DECODER,
    PROJECTOR,
    read_tables,
    read_tower,
    write_tables,
)
from gesso_core.models.vila_u.decoder import pixel_decoder
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.residual_quantizer import ResidualQuantizer
from gesso_core.models.vila_u.tower_config import TowerConfig, decoder_config
from gesso_core.models.vila_u.vision_tower import VisionTower
from golden_case import Adapter, Case
from torch import Tensor


def quantizer_of(case: Case) -> ResidualQuantizer:
    sizes: dict[str, Any] = case.meta["constructor"]
    quantizer = ResidualQuantizer(
        latent_shape=tuple(sizes["latent_shape"]),
        code_shape=tuple(sizes["code_shape"]),
        entries=sizes["n_embed"],
        shared=sizes["shared_codebook"],
        decay=sizes["decay"],
        restart=sizes["restart_unused_codes"],
    )
    quantizer.load_state_dict(read_tables(case.state, quantizer.depth, shared=quantizer.shared))
    return quantizer


def residual_quantizer(case: Case) -> dict[str, Tensor]:
    quantizer, x = quantizer_of(case), case.inputs["x"]
    found = quantizer.encode(x)
    gathered = quantizer.to_code_shape(x)
    sums = {f"partial_sum_{d}": part for d, part in enumerate(found.partial_sums)}
    return sums | {
        "codes": found.codes_BhwD,
        "z_q": found.z_q_BHWC,
        "commitment_loss": found.commitment_loss(gathered).view(1),
        "to_code_shape": gathered,
        "embed_code": quantizer.to_latent_shape(quantizer.embed(found.codes_BhwD)),
        "embed_code_with_depth": quantizer.rows(found.codes_BhwD),
    }


def rq_ema_update(case: Case) -> dict[str, Tensor]:
    quantizer, x = quantizer_of(case), case.inputs["x"]
    recorded = [
        case.inputs[name]
        for d in range(quantizer.depth)
        if (name := f"restart_permutation_{d}") in case.inputs
    ]
    found = quantizer.update(x, permutations=recorded or None)
    after = write_tables(quantizer.state_dict(), quantizer.depth, shared=quantizer.shared)
    return {f"after.{name}": tensor for name, tensor in after.items()} | {
        "codes": found.codes_BhwD,
        "z_q": found.z_q_BHWC,
        "commitment_loss": found.commitment_loss(quantizer.to_code_shape(x)).view(1),
    }


def decoder(case: Case) -> dict[str, Tensor]:
    model = pixel_decoder(decoder_config(case.meta["constructor"]))
    model.load_state_dict(translate(case.state, DECODER, model.state_dict()))
    return {"image": model.eval()(case.inputs["z"])}


def vision_tower(case: Case) -> dict[str, Tensor]:
    config = TowerConfig.from_original(case.meta["constructor"])
    tower = VisionTower(config).eval()
    state = read_tower(case.state, config, prefix="")
    # The contrastive branch is not in the case.
    tower.load_state_dict({**tower.state_dict(), **state})
    x = case.inputs["image"]
    found = tower.encode(x)
    codes, features = found.codes_BhwD.flatten(1, 2), found.features_BhwC
    image = tower.decode(features)
    return {
        "codes": found.codes_BhwD,
        "z_q": features,
        "penultimate_hidden": tower.features(x).flatten(1, 2),
        "patch_embeddings": tower.encoder.embeddings(x),
        "code_embeddings_BLDC": tower.quantizer.rows(codes),
        "summed_code_embeddings_BLC": tower.embed(codes),
        "tower_features_BLC": features.flatten(1, 2),
        "tower_tokens_offset_1000": codes + 1000,
        "image": image,
        "image_0_255": ((image + 1) * 127.5).clamp(0, 255),
    }


def projector(case: Case) -> dict[str, Tensor]:
    sizes, x = case.meta["constructor"], case.inputs["x"]
    produced = {}
    for kind in sizes["types"]:
        model = Projector(kind, sizes["mm_hidden_size"], sizes["hidden_size"])
        own = {
            name.removeprefix(f"{kind}."): tensor
            for name, tensor in case.state.items()
            if name.startswith(f"{kind}.")
        }
        model.load_state_dict(translate(own, PROJECTOR, model.state_dict()))
        produced[kind] = model(x)
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("vila_u", "residual_quantizer"): residual_quantizer,
    ("vila_u", "rq_ema_update"): rq_ema_update,
    ("vila_u", "decoder"): decoder,
    ("vila_u", "vision_tower"): vision_tower,
    ("vila_u", "projector"): projector,
}
