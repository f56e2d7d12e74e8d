"""Drawing with HART, scale by scale (arXiv 2410.10812, section 3.3).

`draw_scale` is one step for a batch: new slots through the transformer, guided logits, codes, and
what they add to the running sum; at the last scale also the continuous residual. `generate` is the
plain loop over it. Guidance grows with the scale: ``t = scale · s/(N - 1)`` at scale s = 0, 1, …;
the last scale keeps the strength of the one before it, for its logits, its smoothing and its
residual.

Where the randomness comes from is in `scale_noise`.
"""

# B samples   R rows, B or 2·B   L text slots   N tokens of a scale   K tokens of a round
# D width   C latent channels   H side of the latent   V vocabulary

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gesso_core.layers.kv_cache import KVRows
from gesso_core.layers.lone_rows import like_in_a_batch
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.scale_noise import ScaleNoise, SeededNoise
from gesso_core.models.hart.transformer import HART, HARTText, level_mask, tokens_at
from gesso_core.sampling.categorical import draw_codes, filtered, gumbel_mixture

TOP_K_EARLY, TOP_K_LATE, EARLY_SCALES = 600, 300, 7
SMOOTHING, SMOOTHING_FALL, SMOOTHING_LEAST = 0.27, 0.95, 0.005


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How codes are drawn; equal for all samples of a step.

    ``top_k`` None is the published rule: 600 at the first seven scales, then 300. ``top_p`` 0 is
    off. ``smooth`` mixes codes by Gumbel-softmax instead of taking the drawn one. ``residual`` adds
    the continuous residual at the last scale, which is drawn in ``rounds`` rounds.
    """

    top_k: int | None = None
    top_p: float = 0.0
    smooth: bool = True
    residual: bool = True
    rounds: int = 1
    temperature: float = 1.0  # of the residual's noise

    def top_k_at(self, scale: int) -> int:
        """How many codes may be drawn from at a scale."""
        if self.top_k is not None:
            return self.top_k
        return TOP_K_EARLY if scale < EARLY_SCALES else TOP_K_LATE


Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Round:
    """Tokens drawn together: where they are (None is everywhere), which codes, and why."""

    places_BK: Tensor | None
    indices_BK: Tensor
    logits_BKV: Tensor


@dataclass(frozen=True)
class ScaleResult:
    """The running sum after a scale, its codes in raster order, and the cache."""

    latent_BCHW: Tensor
    indices_BN: Tensor
    cache: KVRows | None
    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True)
class ScaleInput:
    """What a scale is drawn from.

    ``text`` and ``cache`` have B rows without guidance; with it, B rows with and B without text.
    ``latent_BCHW`` is the running sum, zero at the start. ``kept`` are given codes of this scale
    (N,), or None, per sample. ``cache`` None recomputes all earlier slots from ``history``.
    """

    scale: int
    text: HARTText
    latent_BCHW: Tensor
    cache: KVRows | None
    guidance_B: Tensor  # scale of the guidance
    noises: Sequence[ScaleNoise]
    kept: Sequence[Tensor | None]
    history: tuple[Tensor, ...] = ()  # running sums after scale 1, 2, …, for a run without cache


def guidance_ratio(scale: int, scales: int) -> float:
    """Share of the guidance scale that applies at scale 0, 1, …"""
    return min(scale, max(0, scales - 2)) / (scales - 1)


def draw_by_chance(logits_BKV: Tensor, uniform_BK: Tensor) -> Tensor:
    """Codes (B, K) in proportion to their probability."""
    return draw_codes(logits_BKV, uniform_BK)


def draw_scale(
    model: HART,
    quantizer: MultiScaleQuantizer,
    given: ScaleInput,
    options: DrawOptions,
    choose: Choose = draw_by_chance,
) -> ScaleResult:
    """One scale of every sample."""
    scale, last = given.scale, len(model.config.scales) - 1
    tokens, rounds = model.config.scales[scale] ** 2, 1
    if scale == last:
        rounds = min(options.rounds, tokens)
    places = _places(given, tokens, rounds)
    values_BNC: Tensor | None = None
    if scale > 0:
        values_BNC = quantizer.next_input(given.latent_BCHW, scale)
    batch = len(given.noises)
    embedded_BNC = given.latent_BCHW.new_zeros((batch, tokens, model.config.latent_channels))
    indices_BN = torch.zeros((batch, tokens), dtype=torch.int64, device=model.device)
    cache, done = given.cache, []
    for places_BK in places:
        states_RKD, cache = _states(model, quantizer, given, values_BNC, places_BK, cache)
        drawn, embedded_BKC = _draw_round(
            model, quantizer, given, options, choose, states_RKD, places_BK
        )
        done.append(drawn)
        if places_BK is None:
            embedded_BNC, indices_BN = embedded_BKC, drawn.indices_BK
        else:
            index = places_BK[..., None].expand_as(embedded_BKC)
            embedded_BNC = embedded_BNC.scatter(1, index, embedded_BKC)
            indices_BN = indices_BN.scatter(1, places_BK, drawn.indices_BK)
    added = like_in_a_batch(
        lambda codes_BNC: quantizer.contribution(scale, codes_BNC, phi=scale < last), embedded_BNC
    )
    return ScaleResult(given.latent_BCHW + added, indices_BN, cache, tuple(done))


def round_sizes(tokens: int, rounds: int) -> list[int]:
    """Tokens that each round decides: few at first, by a cosine, at least one."""
    left, sizes = tokens, []
    for number in range(1, rounds):
        later = math.floor(tokens * math.cos(math.pi / 2 * number / rounds))
        later = max(1, min(later, left - 1))
        sizes.append(left - later)
        left = later
    return [*sizes, left]


def _places(given: ScaleInput, tokens: int, rounds: int) -> list[Tensor | None]:
    """Per round the tokens (B, K) in raster order; those late in the order come first."""
    if rounds == 1:
        return [None]
    device = given.latent_BCHW.device
    orders_BN = torch.stack([noise.order(tokens) for noise in given.noises]).to(device)
    ends, result = tokens, []
    for size in round_sizes(tokens, rounds):
        result.append(orders_BN[:, ends - size : ends].sort(dim=1).values)
        ends -= size
    return [*result]


def _states(
    model: HART,
    quantizer: MultiScaleQuantizer,
    given: ScaleInput,
    values_BNC: Tensor | None,
    places_BK: Tensor | None,
    cache: KVRows | None,
) -> tuple[Tensor, KVRows | None]:
    """States (R, K, D) of the tokens of a round."""
    text, scale = given.text, given.scale
    copies = len(text) // len(given.noises)
    if values_BNC is None:
        x = model.text_slots(text)
    else:
        if places_BK is not None:
            values_BNC = tokens_at(values_BNC, places_BK)
        x = model.visual_slots(values_BNC.repeat(copies, 1, 1), scale)
    places_RK = None if places_BK is None else places_BK.repeat(copies, 1)
    angles = model.angles(text, scale, places_RK)
    if cache is not None:
        states, cache = model.run(x, angles, text, cache=cache)
    else:
        states = _recomputed(model, quantizer, given, x, angles, copies)
    return (states[:, -1:] if values_BNC is None else states), cache


def _recomputed(
    model: HART,
    quantizer: MultiScaleQuantizer,
    given: ScaleInput,
    x_RND: Tensor,
    angles_RNd: Tensor,
    copies: int,
) -> Tensor:
    """The new states with all earlier slots run again."""
    text, inputs, angles = given.text, [], []
    if given.scale > 0:
        inputs, angles = [model.text_slots(text)], [model.angles(text, 0)]
    for scale in range(1, given.scale):
        values = quantizer.next_input(given.history[scale - 1], scale).repeat(copies, 1, 1)
        inputs.append(model.visual_slots(values, scale))
        angles.append(model.angles(text, scale))
    inputs, angles = [*inputs, x_RND], [*angles, angles_RNd]
    mask = level_mask([part.shape[1] for part in inputs], model.device)
    states, _ = model.run(torch.cat(inputs, 1), torch.cat(angles, 1), text, mask=mask)
    return states[:, -x_RND.shape[1] :]


def _draw_round(
    model: HART,
    quantizer: MultiScaleQuantizer,
    given: ScaleInput,
    options: DrawOptions,
    choose: Choose,
    states_RKD: Tensor,
    places_BK: Tensor | None,
) -> tuple[Round, Tensor]:
    """The codes of a round, and what they are embedded as, with the residual at the last scale."""
    config, scale, noises = model.config, given.scale, given.noises
    ratio = guidance_ratio(scale, len(config.scales))
    strength_B11 = (given.guidance_B * ratio)[:, None, None]
    logits = model.logits(states_RKD, given.text)
    guided = len(logits) > len(noises)
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = (1 + strength_B11) * conditional - strength_B11 * unconditional
    count, device = logits.shape[1], logits.device
    kept_logits = filtered(logits, top_k=options.top_k_at(scale), top_p=options.top_p)
    uniform_BK = torch.stack([noise.uniform(count) for noise in noises]).to(device)
    indices_BK = choose(kept_logits, uniform_BK)
    embedded_BKC = codes_BKC = quantizer.embed(indices_BK)
    if options.smooth:
        temperature = max(SMOOTHING * (1 - SMOOTHING_FALL * ratio), SMOOTHING_LEAST)
        gumbel = torch.stack([noise.gumbel(count, config.vocabulary) for noise in noises])
        weights_BKV = gumbel_mixture(kept_logits * (1 + ratio), gumbel.to(device), temperature)
        codebook_VC = quantizer.codebook_VC.float()
        mixed = like_in_a_batch(lambda rows: rows @ codebook_VC, weights_BKV.flatten(0, 1))
        embedded_BKC = mixed.view_as(codes_BKC)
    indices_BK, codes_BKC, embedded_BKC = _with_kept(
        quantizer, given.kept, places_BK, indices_BK, codes_BKC, embedded_BKC
    )
    if scale == len(config.scales) - 1 and options.residual:
        strength_B = strength_B11[:, 0, 0] if guided else None
        residual = _residual(model, noises, states_RKD, codes_BKC, strength_B, options.temperature)
        embedded_BKC = embedded_BKC + residual
    return Round(places_BK, indices_BK, logits), embedded_BKC


def _with_kept(
    quantizer: MultiScaleQuantizer,
    kept: Sequence[Tensor | None],
    places_BK: Tensor | None,
    indices_BK: Tensor,
    codes_BKC: Tensor,
    embedded_BKC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Given codes in place of drawn ones, as they are, for the samples that keep some."""
    if all(given is None for given in kept):
        return indices_BK, codes_BKC, embedded_BKC
    rows = []
    for number, indices_N in enumerate(kept):
        if indices_N is None:
            rows.append((indices_BK[number], codes_BKC[number], embedded_BKC[number]))
            continue
        chosen = indices_N if places_BK is None else indices_N[places_BK[number]]
        codes = quantizer.embed(chosen)
        rows.append((chosen, codes, codes))
    indices, codes_parts, embedded = zip(*rows, strict=True)
    return torch.stack(indices), torch.stack(codes_parts), torch.stack(embedded)


def _residual(
    model: HART,
    noises: Sequence[ScaleNoise],
    states_RKD: Tensor,
    codes_BKC: Tensor,
    strength_B: Tensor | None,
    temperature: float,
) -> Tensor:
    """The continuous residual (B, K, C)."""
    batch, count, channels = codes_BKC.shape
    codes_RKC = codes_BKC.repeat(len(states_RKD) // batch, 1, 1)
    conditions = model.residual_condition(states_RKD, codes_RKC).flatten(0, 1)

    def normal(_: int = 0) -> Tensor:
        draws = torch.cat([noise.normal(count, channels) for noise in noises])
        return draws.to(codes_BKC.device)

    if strength_B is None:
        drawn = model.residual.sample(conditions, normal(), normal, temperature)
    else:
        conditional, unconditional = conditions.chunk(2)
        strength_R1 = strength_B.repeat_interleave(count)[:, None]
        drawn = model.residual.sample_guided(
            conditional, unconditional, strength_R1, normal(), normal, temperature
        )
    return drawn.view(batch, count, channels)


@dataclass(frozen=True)
class Generated:
    """Finished latents, and the codes of every scale (B, N)."""

    latent_BCHW: Tensor
    indices: list[Tensor]


@torch.inference_mode()
def generate(
    model: HART,
    quantizer: MultiScaleQuantizer,
    text: HARTText,
    *,
    seeds: Sequence[int],
    guidance: Sequence[float],
    options: DrawOptions | None = None,
    use_cache: bool = True,
) -> Generated:
    """Draw a batch from beginning to end.

    Args:
        model: the transformer.
        quantizer: the tokenizer's, with the same codes and scales.
        text: one embedded text per sample.
        seeds: one per sample.
        guidance: scale of the guidance, one per sample.
        options: how codes are drawn.
        use_cache: keep keys and values, or run all earlier slots again at every scale.
    """
    config, options = model.config, options or DrawOptions()
    rows = HARTText.concatenate([text, model.no_text(len(text))])
    latent = torch.zeros(
        (len(text), config.latent_channels, config.side, config.side), device=model.device
    )
    cache = empty_cache(model, len(rows)) if use_cache else None
    history: list[Tensor] = []
    indices: list[Tensor] = []
    for scale in range(len(config.scales)):
        given = ScaleInput(
            scale=scale,
            text=rows,
            latent_BCHW=latent,
            cache=cache,
            guidance_B=torch.tensor(guidance, dtype=torch.float32, device=model.device),
            noises=[SeededNoise(seed, scale) for seed in seeds],
            kept=[None] * len(seeds),
            history=tuple(history),
        )
        result = draw_scale(model, quantizer, given, options)
        latent, cache = result.latent_BCHW, result.cache
        history.append(latent)
        indices.append(result.indices_BN)
    return Generated(latent, indices)


def empty_cache(model: HART, rows: int) -> KVRows:
    """A cache with room for a whole picture."""
    config = model.config
    return KVRows.empty(
        layers=config.depth,
        rows=rows,
        heads=config.heads,
        head_dim=config.head_dim,
        capacity=config.slots,
        like=model.word_embed.weight,
    )
