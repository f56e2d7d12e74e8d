"""Adapters of the HART cases: blocks, rotation, residual diffusion, training and drawing."""

from typing import Any

import torch
from gesso_core.layers.embeddings import timestep_sinusoid
from gesso_core.layers.kv_cache import KVRows
from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.blocks import Block, pooled_text
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.generation import (
    DrawOptions,
    ScaleInput,
    draw_scale,
    empty_cache,
    guidance_ratio,
)
from gesso_core.models.hart.losses import TrainingTargets, kept_tokens, training_losses
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.residual_diffusion import ResidualDiffusion
from gesso_core.models.hart.rotary import (
    cos_sin,
    frequencies,
    grid_angles,
    grid_positions,
    rotate,
    text_angles,
)
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.transformer import HART, HARTText, level_mask, text_positions
from gesso_core.models.keys.hart import HART_BLOCK, HART_ORIGINAL, HART_RESIDUAL
from gesso_core.models.keys.hart_tokenizer import AUTOENCODER, quantizer_keys, under
from gesso_core.models.keys.translate import translate
from gesso_core.sampling.categorical import filtered, gumbel_mixture
from gesso_core.text.qwen2 import encode_ids, padded_ids
from gesso_core.text.states import TextStates
from golden_case import Adapter, Case
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model


def loaded(module: nn.Module, state: dict[str, Tensor], rules: Any) -> Any:
    module.load_state_dict(translate(state, rules, expected=module.state_dict()))
    return module.eval()


def block(case: Case) -> dict[str, Tensor]:
    """One block on the whole sequence, and scale by scale with a cache."""
    options = case.meta["constructor"]
    config = HARTConfig(
        scales=tuple(options["patch_nums"]),
        vocabulary=1,
        latent_channels=1,
        context_tokens=options["context_token"],
        context_channels=options["cond_dim"],
        width=options["embed_dim"],
        depth=1,
        heads=options["num_heads"],
        ffn_ratio=options["mlp_ratio"],
        norm_eps=options["norm_eps"],
        rope_theta=options["rope_theta"],
        attention_norm=options["attn_l2_norm"],
        modulation="shared"
        if options["shared_aln"]
        else ("none" if options["disable_aln"] else "pooled"),
        pooling=options["sep_aln_pooling_mode"],
    )
    module = loaded(Block(config), case.state, HART_BLOCK)
    given, dim = case.inputs, config.head_dim
    positions_BL = given["context_position_ids"]
    shared = config.modulation == "shared"
    pooled = None
    if config.modulation != "none":
        pooling = "avg" if shared else config.pooling
        pooled = pooled_text(given["cond"], given["context_mask"], pooling)
    grid_N2 = torch.cat([grid_positions(side, config.side) for side in config.scales[1:]])
    grid_BN2 = grid_N2 + positions_BL[:, -1, None, None]
    angles = torch.cat(
        [
            text_angles(positions_BL, dim, config.rope_theta),
            grid_angles(grid_BN2, dim, config.rope_theta),
        ],
        dim=1,
    )
    lengths = [config.context_tokens, *(side * side for side in config.scales[1:])]
    mask = level_mask(lengths, torch.device("cpu"))
    x = given["x"]
    produced = {"full_masked": module(x, cos_sin(angles, x.dtype), mask, pooled)}
    cache = KVRows.empty(
        layers=1, rows=len(x), heads=config.heads, head_dim=dim, capacity=x.shape[1], like=x
    )
    start = 0
    for scale, length in enumerate(lengths):
        here = slice(start, start + length)
        writer = cache.writer(length)
        table = cos_sin(angles[:, here], x.dtype)
        produced[f"cached_scale_{scale}"] = module(x[:, here], table, None, pooled, (writer, 0))
        cache, start = writer.rows, start + length
    return produced


def rope(case: Case) -> dict[str, Tensor]:
    """Positions, both tables, and rotated queries and keys."""
    options = case.meta["constructor"]
    scales, dim, theta = options["patch_nums"], options["head_dim"], options["base"]
    positions_BL = case.inputs["context_position_ids"]
    shift = positions_BL[:, -1, None, None]
    batch = len(positions_BL)
    grids = [grid_positions(side, scales[-1]).expand(batch, -1, -1) for side in scales]
    produced = {f"grid_positions_scale_{i:02d}": grid for i, grid in enumerate(grids)}
    every = torch.cat(grids[1:], dim=1)
    text, visual = text_angles(positions_BL, dim, theta), grid_angles(every + shift, dim, theta)
    table = cos_sin(torch.cat([text, visual], dim=1), torch.float32)
    produced |= {
        "grid_positions_all_scales_after_first": every,
        "rope1d.cos": text.cos(),
        "rope1d.sin": text.sin(),
        "rope1d.inv_freq": frequencies(dim, 2, theta),
        "rope2d.cos": visual.cos(),
        "rope2d.sin": visual.sin(),
        "rope2d.inv_freq": frequencies(dim, 4, theta),
        "q_rot": rotate(case.inputs["q_BHLd"], table),
        "k_rot": rotate(case.inputs["k_BHLd"], table),
    }
    return {name: produced[name] for name in case.outputs}


def residual_diffusion(case: Case) -> dict[str, Tensor]:
    """Network, losses, schedules and deterministic sampling."""
    options, given = case.meta["constructor"], case.inputs
    head: ResidualDiffusion = loaded(
        ResidualDiffusion(
            channels=options["target_channels"],
            condition=options["z_channels"],
            width=options["width"],
            depth=options["depth"],
            steps=int(options["num_sampling_steps"]),
        ),
        case.state,
        HART_RESIDUAL,
    )
    embedded, scale = head.net.condition(given["c"]), case.meta["cfg"]
    rows = len(given["x"]) // 2
    noise = given["sample.step_noise"]

    def guided_at(x: Tensor, times: Tensor) -> Tensor:
        both = torch.cat([x[:rows], x[:rows]])
        eps, variance = head.net(both, times, embedded).chunk(2, dim=1)
        guided = (1 + scale) * eps[:rows] - scale * eps[rows:]
        return torch.cat([torch.cat([guided, guided]), variance], dim=1)

    trajectories: dict[str, list[Tensor]] = {"cfg": [], "nocfg": []}

    def guided(x: Tensor, time: int) -> tuple[Tensor, Tensor]:
        trajectories["cfg"].append(x)
        eps, variance = head.predict_guided(x[:rows], time, embedded, scale)
        return torch.cat([eps, eps]), variance

    def plain(x: Tensor, time: int) -> tuple[Tensor, Tensor]:
        trajectories["nocfg"].append(x)
        eps, variance = head.net(x, torch.full((len(x),), float(time)), embedded).chunk(2, dim=1)
        return eps, variance

    start = given["sample.init_noise_half"]
    losses = head.losses(given["train.target"], given["c"], given["train.t"], given["train.noise"])
    produced = {
        "net.forward": head.net(given["x"], given["t"], embedded),
        "net.forward_with_cfg": guided_at(given["x"], given["t"]),
        "net.sinusoid": timestep_sinusoid(given["t"], head.net.time.frequencies),
        "net.time_embed": head.net.time(given["t"]),
        "sample_cfg.out": head.denoise(torch.cat([start, start]), guided, noise.__getitem__),
        "sample_nocfg.out": head.denoise(torch.cat([start, -start]), plain, noise.__getitem__),
        "train.loss": losses.total,
        "train.mse": losses.squared_R,
        "train.vb": losses.variational_R,
        "train.x_t": losses.noisy_RC,
    }
    used = head.sample_guided(
        given["c"][:rows], given["c"][rows:], scale, start, lambda i: noise[i, :rows]
    )
    torch.testing.assert_close(used, produced["sample_cfg.out"][:rows], atol=1e-6, rtol=1e-5)
    for name, states in trajectories.items():
        produced[f"sample_{name}.x_trajectory"] = torch.stack(states)
    for name, schedule in (("gen", head.drawing_schedule), ("train", head.training_schedule)):
        produced |= {
            f"schedule_{name}.alphas_cumprod": schedule.cumulative,
            f"schedule_{name}.betas": schedule.betas_T,
            f"schedule_{name}.posterior_log_variance_clipped": schedule.least_log_variance,
            f"schedule_{name}.posterior_mean_coef1": schedule.mean_of_clean,
            f"schedule_{name}.posterior_mean_coef2": schedule.mean_of_noisy,
            f"schedule_{name}.sqrt_recip_alphas_cumprod": schedule.clean_of_noisy,
            f"schedule_{name}.sqrt_recipm1_alphas_cumprod": schedule.clean_of_noise,
            f"schedule_{name}.timestep_map": torch.tensor(schedule.times),
        }
    return {name: produced[name] for name in case.outputs}


def sampling_filters(case: Case) -> dict[str, Tensor]:
    """Which logits stay, and the softened draw; the temperature is in the output's name."""
    logits = case.inputs["logits"]
    produced = {}
    for number, (k, p) in enumerate(case.meta["constructor"]["top_k_top_p"]):
        produced[f"kept_{number}"] = filtered(logits, top_k=k, top_p=p).isfinite()
    for name in case.outputs:
        if name.startswith("gumbel_softmax_tau_"):
            tau = float(name.rsplit("_", 1)[1])
            produced[name] = gumbel_mixture(logits, case.inputs["gumbel_noise"], tau)
    return produced


def models(case: Case) -> tuple[HART, MultiScaleQuantizer]:
    """Transformer and quantizer of a case with both."""
    options = case.meta["constructor"]
    tokenizer = options["tokenizer"]
    config = HARTConfig.from_original(
        options["transformer"],
        vocabulary=tokenizer["vocab_size"],
        latent_channels=tokenizer["z_channels"],
    )
    own = {k: v for k, v in case.state.items() if not k.startswith("vae.")}
    theirs = {k: v for k, v in case.state.items() if k.startswith("vae.quantize.")}
    quantizer = MultiScaleQuantizer(
        vocabulary=config.vocabulary,
        channels=config.latent_channels,
        scales=config.scales,
        phi_ratio=tokenizer["quant_resi"],
        phi_sharing=tokenizer["share_quant_resi"],
    )
    rules = under(quantizer_keys(tokenizer["share_quant_resi"]), "vae.quantize.", "")
    return loaded(HART(config), own, HART_ORIGINAL), loaded(quantizer, theirs, rules)


def t2i_forward(case: Case) -> dict[str, Tensor]:
    """Logits, cross-entropy and diffusion loss with a fixed choice of tokens."""
    model, quantizer = models(case)
    given, scales = case.inputs, model.config.scales
    ratio = next(
        float(line.split("constant ")[1]) for line in case.meta["stubs"] if "mask ratio" in line
    )
    kept_BK = kept_tokens(given["orders"], ratio)
    targets = TrainingTargets(
        [given[f"gt_idx_{i:02d}"] for i in range(len(scales))],
        given["x_var_input"],
        given["f_rest"],
    )
    text = model.encode_text(given["context"], given["context_mask"], given["context_position_ids"])
    losses = training_losses(
        model,
        text,
        targets,
        quantizer.codebook_VC,
        choose=lambda logits: logits.argmax(-1),
        draw_noise=lambda rows: (given["diff.t"], given["diff.noise"]),
        kept_BK=kept_BK,
    )
    batch = torch.arange(len(kept_BK))[:, None].expand_as(kept_BK)
    return {
        "cross_entropy_mean": losses.cross_entropy_BM.mean()[None],
        "diff.target": losses.residual_RC,
        "diff.z": losses.condition_RD,
        "diff_loss": losses.diffusion.total.mean()[None],
        "kept_last_scale_batch_index": batch.flatten(),
        "kept_last_scale_token_index": kept_BK.flatten(),
        "last_scale_argmax": losses.sampled_BK,
        "logits_from_first_scale": losses.logits_BMV,
    }


class RecordedNoise:
    """The noise of a case for one sample: what was recorded of it, in the order of asking."""

    def __init__(self, case: Case, sample: int, step: int, batch: int) -> None:
        self.given, self.sample, self.step, self.batch = case.inputs, sample, step, batch
        self.round, self.draws = -1, 0

    def order(self, tokens: int) -> Tensor:
        return self.given["orders"][self.sample]

    def uniform(self, tokens: int) -> Tensor:
        self.round, self.draws = self.round + 1, 0
        return torch.zeros(tokens)  # the choice of a case is the best code

    def gumbel(self, tokens: int, vocabulary: int) -> Tensor:
        return self.given[f"step_{self.step + self.round:02d}.gumbel_noise"][self.sample]

    def normal(self, tokens: int, channels: int) -> Tensor:
        self.draws += 1
        name = f"diffusion_{self.round}"
        here = slice(self.sample * tokens, (self.sample + 1) * tokens)
        if self.draws == 1:
            return self.given[f"{name}.init_noise_half"][here]
        return self.given[f"{name}.step_noise"][self.draws - 2][here]


def both_halves(model: HART, case: Case, number: int, z: Tensor, guidance: float) -> Tensor:
    """The residual of a round, for the rows without text as well, whose result is not used."""
    head, rows = model.residual, len(z) // 2
    embedded = head.net.condition(z)

    def predict(x: Tensor, time: int) -> tuple[Tensor, Tensor]:
        eps, variance = head.predict_guided(x[:rows], time, embedded, guidance)
        return torch.cat([eps, eps]), variance

    start = case.inputs[f"diffusion_{number}.init_noise_half"]
    noise = case.inputs[f"diffusion_{number}.step_noise"]
    return head.denoise(torch.cat([start, start]), predict, noise.__getitem__)


def decoder(case: Case) -> HARTAutoencoder:
    """The tokenizer's decoder; its encoder is not part of a case."""
    config = HARTTokenizerConfig.from_original(case.meta["constructor"]["tokenizer"])
    state = {
        k.removeprefix("vae."): v
        for k, v in case.state.items()
        if k.startswith(("vae.decoder.", "vae.post_quant_conv."))
    }
    module = HARTAutoencoder(config)
    missing = module.load_state_dict(translate(state, AUTOENCODER), strict=False)
    assert all(key.startswith(("encoder.", "quant_conv.")) for key in missing.missing_keys)
    assert not missing.unexpected_keys
    return module.eval()


def t2i_generate(case: Case) -> dict[str, Tensor]:
    """All scales with recorded noise and the best code at every place."""
    model, quantizer = models(case)
    given, call, scales = case.inputs, case.meta["call"], model.config.scales
    options = DrawOptions(
        top_p=call["top_p"],
        smooth=call["more_smooth"],
        residual=call["final_stage"] == 0,
        rounds=call["num_maskgit_iters"],
    )
    text = model.encode_text(given["context"], given["context_mask"], given["context_position_ids"])
    batch = len(text)
    rows = HARTText.concatenate([text, model.no_text(batch)])
    conditions: list[Tensor] = []
    model.decoder_norm.register_forward_hook(lambda m, a, out: conditions.append(out.flatten(0, 1)))
    latent = torch.zeros(batch, model.config.latent_channels, scales[-1], scales[-1])
    cache = empty_cache(model, len(rows))
    produced: dict[str, Tensor] = {}
    for scale in range(len(scales)):
        step = ScaleInput(
            scale=scale,
            text=rows,
            latent_BCHW=latent,
            cache=cache,
            guidance_B=torch.full((batch,), float(call["cfg"])),
            noises=[RecordedNoise(case, i, scale, batch) for i in range(batch)],
            kept=[None] * batch,
        )
        result = draw_scale(model, quantizer, step, options, lambda logits, _: logits.argmax(-1))
        latent, cache = result.latent_BCHW, result.cache
        assert cache is not None
        for number, drawn in enumerate(result.rounds, start=scale):
            produced[f"step_{number:02d}.guided_logits"] = drawn.logits_BKV
            produced[f"step_{number:02d}.token_idx"] = drawn.indices_BK
        if scale + 1 < len(scales):
            side = scales[scale + 1]
            values = quantizer.next_input(latent, scale + 1)
            produced[f"step_{scale:02d}.f_hat"] = latent
            produced[f"step_{scale:02d}.next_input_map"] = values.mT.unflatten(2, (side, side))
    guidance = call["cfg"] * guidance_ratio(len(scales) - 1, len(scales))
    for number, z in enumerate(conditions):
        produced[f"diffusion_{number}.z"] = z
        produced[f"diffusion_{number}.residual"] = both_halves(model, case, number, z, guidance)
    produced["f_hat_final"] = latent
    produced["image_01"] = decoder(case).decode(latent) * 0.5 + 0.5
    return {name: produced[name] for name in case.outputs}


def text_encode(case: Case) -> dict[str, Tensor]:
    """States with and without the instruction in front."""
    options = case.meta["constructor"]
    settings = dict(options["text_model"])
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = Qwen2Config(**settings, rope_parameters=rope, attn_implementation="eager")
    text_model = Qwen2Model(config).eval()
    text_model.load_state_dict({k.removeprefix("model."): v for k, v in case.state.items()})
    prompts = [case.inputs[f"prompt_{i}"].tolist() for i in range(3)]
    length, pad_id = options["max_token_length"], options["pad_token_id"]
    left = options["padding_side"] == "left"
    produced = {}
    for name, prefix in (("plain", []), ("with_system", case.inputs["system_prompt"].tolist())):
        states = TextStates.concatenate(
            [
                encode_ids(text_model, ids, prefix, length=length, pad_id=pad_id, left=left)
                for ids in prompts
            ]
        )
        padded = [padded_ids(ids, length, pad_id, left=left) for ids in prompts]
        produced |= {
            f"{name}.context_tensor": states.states_BLC,
            f"{name}.context_mask": states.mask_BL,
            f"{name}.context_tokens": torch.tensor(padded),
            f"{name}.context_position_ids": text_positions(states.mask_BL),
        }
    return produced


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("hart", "block"): block,
    ("hart", "rope"): rope,
    ("hart", "residual_diffusion"): residual_diffusion,
    ("hart", "sampling_filters"): sampling_filters,
    ("hart", "t2i_forward"): t2i_forward,
    ("hart", "t2i_generate"): t2i_generate,
    ("hart", "text_encode"): text_encode,
}
