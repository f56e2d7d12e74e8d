"""Adapters of the VILA-U cases: the depth transformer, its filters, and the whole model."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from gesso_core.models.keys.translate import translate
from gesso_core.models.keys.vila_u import DEPTH_TRANSFORMER
from gesso_core.models.keys.vila_u_tower import read_tower
from gesso_core.models.vila_u.code_sampling import top_k_filter, top_p_filter
from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.models.vila_u.drawing import Rows, draw_codes, next_states
from gesso_core.models.vila_u.losses import training_losses
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.packing import pack_rows
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.residual_quantizer import Codebook
from gesso_core.models.vila_u.splice import Picture, Row, pad_rows, splice
from gesso_core.models.vila_u.vision_tower import VisionTower
from golden_case import Adapter, Case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def greedy(seen: list[Tensor]) -> Any:
    def choose(logits_BK: Tensor, depth: int) -> Tensor:
        seen.append(logits_BK)
        return logits_BK.argmax(dim=-1)

    return choose


def load_depth_transformer(values: dict[str, Any], state: dict[str, Tensor]) -> DepthTransformer:
    model = DepthTransformer(DepthConfig.from_original(values))
    model.load_state_dict(translate(state, DEPTH_TRANSFORMER, expected=model.state_dict()))
    return model.eval()


def depth_transformer(case: Case) -> dict[str, Tensor]:
    """Teacher forcing, and greedy codes under guidance."""
    table = case.state["aux_codebook.weight"]
    codebook = Codebook(len(table) - 1, table.shape[1])
    codebook.table_VC.copy_(table)
    state = {k: v for k, v in case.state.items() if not k.startswith("aux_codebook")}
    model = load_depth_transformer(case.meta["constructor"], state)
    codes = case.inputs["codes"]
    logits = model(case.inputs["hidden"], codebook.rows(codes).cumsum(dim=-2))
    states_RS = case.inputs["generate.hidden"][:, 0]
    half = len(states_RS) // 2
    guided_logits: list[Tensor] = []
    tables = [codebook] * model.config.depth
    scales_B = torch.full((half,), float(case.meta["cfg"]))
    rows = Rows.of([True] * half)
    drawn = draw_codes(model, tables, states_RS, rows, scales_B, greedy(guided_logits))
    both = torch.cat([drawn, drawn])[:, None]
    return {
        "logits": logits,
        "cross_entropy": F.cross_entropy(logits.flatten(0, -2), codes.flatten())[None],
        "generate.codes": both,
        "generate.features": codebook.rows(both).sum(dim=-2),
        "generate.guided_logits_by_depth": torch.stack(guided_logits, dim=1),
    }


def code_sampling_filters(case: Case) -> dict[str, Tensor]:
    """Probabilities behind top-k and top-p, for every pair of the constructor."""
    logits = case.inputs["logits"]
    produced = {}
    for number, (top_k, top_p) in enumerate(case.meta["constructor"]["top_k_top_p"]):
        kept = logits if top_k is None else top_k_filter(logits, torch.full((len(logits),), top_k))
        probs = kept.softmax(dim=-1)
        if top_p is not None:
            probs = top_p_filter(probs, torch.full((len(logits),), top_p))
        produced[f"probs_{number}"] = probs
    return produced


def load_unified(case: Case) -> VilaU:
    options = case.meta["constructor"]
    special = options["special_token_ids"]
    config = VilaUConfig.from_original(
        {"chat_template_gesso": {}},
        options["llm"],
        {"rqvaesiglip": options["vision_tower"], "rqtransformer": options["rqtransformer"]},
        {"mm_projector_type": options["mm_projector"]},
    )
    assert (config.im_start, config.im_end) == (special["im_start"], special["im_end"])
    assert (config.vi_start, config.vi_end) == (special["vi_start"], special["vi_end"])
    tower = VisionTower(config.tower)
    state = read_tower(part(case.state, "vision_tower."), config.tower, tower.state_dict())
    tower.load_state_dict(state, strict=False)
    projector = Projector(config.projector, config.tower.width, config.state_width)
    projector.load_state_dict(part(case.state, "mm_projector."))
    llm = LlamaForCausalLM(LlamaConfig(**options["llm"]))
    llm.load_state_dict(part(case.state, "llm."))
    depth = load_depth_transformer(
        options["rqtransformer"], part(case.state, "vision_tower.rqtransformer.")
    )
    return VilaU(config, tower, projector, depth, llm).eval()


def codes_of(model: VilaU, pixels: Tensor) -> Tensor:
    """(B, N, D)."""
    return model.tower.encode(pixels).codes_BhwD.flatten(1, 2)


def rows_of(case: Case, model: VilaU, name: str, pictures: Tensor) -> list[Row]:
    """The rows of a training batch; a picture is the answer where its start marker is a target."""
    ids, labels = case.inputs[f"{name}.input_ids"], case.inputs[f"{name}.labels"]
    mask = case.inputs.get(f"{name}.attention_mask", torch.ones_like(ids))
    codes = iter(codes_of(model, pictures))
    start = {model.config.im_start, model.config.vi_start}
    rows = []
    for ids_L, labels_L, mask_L in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        length = sum(mask_L)
        answer = any(label in start for label in labels_L)
        count = ids_L[:length].count(-200)
        rows.append(
            splice(
                ids_L[:length],
                [Picture(codes_ND=next(codes), answer=answer) for _ in range(count)],
                depth=model.config.depth.depth,
                vocabulary=model.config.vocabulary,
                labels=labels_L[:length],
            )
        )
    return rows


def drawn(case: Case, model: VilaU, name: str, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy codes (2, T, D) and guided logits in the order of drawing."""
    seen: list[Tensor] = []
    ids = case.inputs[f"{name}.input_ids"]
    mask = ids.cumsum(dim=1) > 0  # padded on the left with id 0
    caches, lengths, states = [], [], []
    for row, real in zip(ids, mask, strict=True):
        embeddings = model.embed_text(row[real])[None]
        caches.append(model.rows.new_cache(embeddings.shape[1] + steps, embeddings))
        states.append(model.rows(embeddings, caches[-1:], [0])[0, -1])
        lengths.append(embeddings.shape[1])
    rows, states_RS, codes = Rows.of([True]), torch.stack(states), []
    scale = torch.tensor([float(case.meta["cfg"])])
    for _ in range(steps):
        tables = model.tower.quantizer.tables
        codes.append(
            draw_codes(model.depth_transformer, tables, states_RS, rows, scale, greedy(seen))
        )
        states_RS = next_states(model, codes[-1], rows, caches, lengths)
        lengths = [length + 1 for length in lengths]
    return torch.stack(codes, dim=1).expand(2, -1, -1), torch.stack(seen)


def answered(case: Case, model: VilaU, count: int) -> Tensor:
    """Greedy token ids (1, count) behind a prompt with a picture."""
    codes = codes_of(model, case.inputs["i2t.image"])[0]
    config = model.config
    row = splice(
        case.inputs["i2t.input_ids"][0].tolist(),
        [Picture(codes_ND=codes)],
        depth=config.depth.depth,
        vocabulary=config.vocabulary,
    )
    embeddings = model.embed(pad_rows([row]))
    cache = model.rows.new_cache(len(row) + count, embeddings)
    states, length, ids = model.rows(embeddings, [cache], [0])[:, -1], len(row), []
    for _ in range(count):
        ids.append(model.text_logits(states).argmax(dim=-1))
        states = model.rows(model.embed_text(ids[-1])[:, None], [cache], [length])[:, 0]
        length += 1
    return torch.stack(ids, dim=1)


def unified_model(case: Case) -> dict[str, Tensor]:
    """Splicing, packing, losses, and the directions of generation."""
    model, want = load_unified(case), case.outputs
    rows = rows_of(case, model, "train", case.inputs["train.images"])
    spliced, packed = pad_rows(rows), pack_rows(rows)
    losses = training_losses(model, spliced)
    video = pad_rows(rows_of(case, model, "video", case.inputs["video.frames"]))
    t2i_codes, t2i_logits = drawn(case, model, "t2i", want["t2i.codes"].shape[1])
    t2v_codes, _ = drawn(case, model, "t2v", want["t2v.codes"].shape[1])
    # In fp64, since on the scale of 255 a value near 0 has lost its digits in fp32.
    tower = copy.deepcopy(model.tower).double()
    features = tower.embed(t2i_codes[:1]).view(1, *model.config.tower.grid, -1)
    produced = {
        "splice.inputs_embeds": model.embed(spliced),
        "splice.labels_BLD": spliced.labels_BLD,
        "splice.attention_mask": spliced.mask_BL.to(torch.uint8),
        "repack.inputs_embeds": model.embed(packed),
        "repack.labels": packed.labels_BLD,
        "repack.attention_mask": packed.mask_BL.to(torch.uint8),
        "repack.position_ids": packed.positions_BL,
        "repack.sorted_seqlens": torch.tensor(sorted(map(len, rows), reverse=True)),
        "logits": model.text_logits(model.states(spliced)),
        "loss_text": losses.text[None],
        "loss_image": losses.image[None],
        "loss_total": losses.total[None],
        "video.loss_total": training_losses(model, video).total[None],
        "t2i.codes": t2i_codes,
        "t2i.guided_logits": t2i_logits,
        "t2v.codes": t2v_codes,
        "t2i.image_0_255": ((tower.decode(features) + 1) * 127.5).clamp(0, 255),
        "i2t.new_token_ids": answered(case, model, want["i2t.new_token_ids"].shape[1]),
    }
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("vila_u", "depth_transformer"): depth_transformer,
    ("vila_u", "code_sampling_filters"): code_sampling_filters,
    ("vila_u", "unified_model"): unified_model,
}
