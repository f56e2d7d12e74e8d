"""What keeping keys and values gains, in HART and in VILA-U's depth transformer.

Both ways run in turn on the same weights and inputs, and must choose the same codes. Where caching
cannot reach the target, the row says so itself: ``least_work`` is by how much the slots that have
to be computed shrink, and no program can gain more than that in the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from cpu_timing import Row, compared, in_turn
from gesso_core.models.hart.config import SCALES, HARTConfig
from gesso_core.models.hart.generation import DrawOptions, Generated, generate
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.transformer import HART, HARTText
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.vila_u import VilaUPipeline
from torch import Tensor, nn

# R rows   D codes of a position   S width of the states   C width of a code vector   K codes

TARGET = 3.0
PUBLISHED_TEXT = 300  # text slots of the published HART
GUIDANCE = 4.5
PROMPTS = (
    "a red apple, 3D style, on a blue background",
    "a cat in flat style",
    "two green pears on a white table",
    "a small yellow lemon, 3D style",
)


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    repeats: int
    batches: tuple[int, ...]
    scales: tuple[int, ...]  # of the HART with random weights
    text_slots: int
    drawings: tuple[int, ...]  # of the depth transformer


FULL = Sizes(15, (1, 8), SCALES[256], PUBLISHED_TEXT, (1, 8, 32))
SMOKE = Sizes(1, (2,), (1, 2, 3), 12, (2,))


def caching(hart: HartPipeline, vila_u: VilaUPipeline, sizes: Sizes) -> Iterator[Row]:
    """Rows of all comparisons."""
    for batch in sizes.batches:
        yield from _served_hart(hart, batch, sizes.repeats)
    model, quantizer = random_hart(hart.model.config, sizes.scales, sizes.text_slots)
    for batch in sizes.batches:
        text = _random_text(model, batch)
        run = partial(_drawn, model, quantizer, text, _options(hart))
        label = f"hart, tiny width, random weights, scales {_listed(sizes.scales)}"
        few = max(1, sizes.repeats // 5)  # a run takes seconds
        yield _hart_row(f"{label}, {sizes.text_slots} text slots", model, run, batch, few)
    transformer, tables = vila_u.model.depth_transformer, vila_u.model.tower.quantizer.tables
    table_KC = tables[0].table_VC
    for drawings in sizes.drawings:
        yield _depth_row("vilau-tiny", transformer, table_KC, drawings, sizes.repeats)
    for depth in (4, 16) if sizes is FULL else ():
        config = replace(transformer.config, depth=depth)
        other = _random_depth_transformer(config)
        label = "tiny width, random weights"
        yield _depth_row(label, other, table_KC, max(sizes.drawings), sizes.repeats)


def random_hart(
    like: HARTConfig, scales: tuple[int, ...], text_slots: int
) -> tuple[HART, MultiScaleQuantizer]:
    """A HART of the same width and depth with another list of scales, weights drawn from a seed."""
    config = replace(like, scales=scales, context_tokens=text_slots)
    model = HART(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    initialize_weights(model, generator)
    nn.init.normal_(model.head.weight, std=0.2, generator=generator)  # some codes stand out
    quantizer = MultiScaleQuantizer(
        vocabulary=config.vocabulary, channels=config.latent_channels, scales=scales
    )
    nn.init.normal_(quantizer.codebook_VC, generator=generator)
    return model, quantizer.eval().requires_grad_(False)


def least_work(config: HARTConfig) -> float:
    """Slots through the layers without a cache, over those with one; a row of a picture."""
    new = [config.context_tokens, *(side * side for side in config.scales[1:])]
    return sum(sum(new[: scale + 1]) for scale in range(len(new))) / sum(new)


def _served_hart(pipeline: HartPipeline, batch: int, repeats: int) -> Iterator[Row]:
    """The small HART: the plain loop with and without cache, and the pipeline as it serves."""
    texts, model = [_draft_text(pipeline, number) for number in range(batch)], pipeline.model
    text = HARTText.concatenate(texts)
    run = partial(_drawn, model, pipeline.quantizer, text, _options(pipeline))
    name = pipeline.entry.name
    yield _hart_row(f"{name}, plain loop", model, run, batch, repeats)
    served = partial(_served, pipeline, batch)
    shown, recomputed = served(), run(False)
    times = in_turn({"recomputed": lambda: run(False), "cached": served}, repeats)
    yield {
        "what": f"{name}, pipeline (keeps the slots without text for all pictures)",
        "batch": batch,
        **compared(times, "recomputed", "cached", TARGET),
        **_difference(recomputed, shown),
    }


def _drawn(
    model: HART,
    quantizer: MultiScaleQuantizer,
    text: HARTText,
    options: DrawOptions,
    use_cache: bool,
) -> Generated:
    batch = len(text)
    return generate(
        model,
        quantizer,
        text,
        seeds=range(batch),
        guidance=[GUIDANCE] * batch,
        options=options,
        use_cache=use_cache,
    )


def _options(pipeline: HartPipeline) -> DrawOptions:
    """As the small HART is drawn from."""
    defaults = pipeline.defaults
    return DrawOptions(
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        smooth=defaults.smooth,
        temperature=defaults.temperature,
    )


def _served(pipeline: HartPipeline, batch: int) -> Generated:
    drafts = [pipeline.begin(_recipe(pipeline, number)) for number in range(batch)]
    while not drafts[0].done:
        drafts = pipeline.advance(drafts)
    indices = [torch.stack(codes) for codes in zip(*(d.indices for d in drafts), strict=True)]
    return Generated(torch.stack([draft.latent_CHW for draft in drafts]), indices)


def _recipe(pipeline: HartPipeline, number: int) -> Any:
    side, prompt = pipeline.entry.native_size, PROMPTS[number % len(PROMPTS)]
    request = GenerationRequest(
        prompt=prompt, width=side, height=side, seed=number, guidance_scale=GUIDANCE
    )
    return pipeline.recipe(request)


def _draft_text(pipeline: HartPipeline, number: int) -> HARTText:
    return pipeline.begin(_recipe(pipeline, number)).text


def _hart_row(
    label: str, model: HART, run: Callable[[bool], Generated], batch: int, repeats: int
) -> Row:
    cached, recomputed = run(True), run(False)
    times = in_turn({"recomputed": lambda: run(False), "cached": lambda: run(True)}, repeats)
    return {
        "what": label,
        "batch": batch,
        **compared(times, "recomputed", "cached", TARGET),
        "least_work": round(least_work(model.config), 2),
        **_difference(recomputed, cached),
    }


def _difference(one: Generated, other: Generated) -> Row:
    """Codes that differ, and by how much the latents do."""
    pairs = zip(one.indices, other.indices, strict=True)
    return {
        "codes": sum(codes.numel() for codes in one.indices),
        "different_codes": sum(int((a != b).sum()) for a, b in pairs),
        "largest_difference": float((one.latent_BCHW - other.latent_BCHW).abs().max()),
    }


def _random_text(model: HART, batch: int) -> HARTText:
    config, generator = model.config, torch.Generator().manual_seed(1)
    shape = (batch, config.context_tokens)
    states = torch.randn(*shape, config.context_channels, generator=generator)
    return model.encode_text(states, torch.ones(shape, dtype=torch.long))


def _random_depth_transformer(config: DepthConfig) -> DepthTransformer:
    generator = torch.Generator().manual_seed(2)
    model = DepthTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


@torch.inference_mode()
def _depth_row(
    label: str, model: DepthTransformer, table_KC: Tensor, drawings: int, repeats: int
) -> Row:
    """One position of so many guided drawings, the likeliest code every time."""
    config = model.config
    generator = torch.Generator().manual_seed(3)
    state_RS = torch.randn(max(4, 2 * drawings), config.state_width, generator=generator)
    cached = partial(torch.inference_mode()(_codes_cached), model, table_KC, state_RS)
    recomputed = partial(torch.inference_mode()(_codes_recomputed), model, table_KC, state_RS)
    different = int((cached() != recomputed()).sum())
    assert different == 0, f"{different} codes differ with the cache"
    times = in_turn({"recomputed": recomputed, "cached": cached}, repeats)
    return {
        "what": f"depth transformer, {label}, {config.depth} codes per position",
        "batch": drawings,
        **compared(times, "recomputed", "cached", TARGET),
        "least_work": (config.depth + 1) / 2,
        "codes": len(state_RS) * config.depth,
        "different_codes": different,
    }


def _codes_cached(model: DepthTransformer, table_KC: Tensor, state_RS: Tensor) -> Tensor:
    logits_RK, cache = model.begin(state_RS)
    codes, sum_RC = [logits_RK.argmax(dim=-1)], table_KC.new_zeros(())
    while len(codes) < model.config.depth:
        sum_RC = sum_RC + table_KC[codes[-1]]
        codes.append(model.extend(sum_RC, cache).argmax(dim=-1))
    return torch.stack(codes, dim=-1)


def _codes_recomputed(model: DepthTransformer, table_KC: Tensor, state_RS: Tensor) -> Tensor:
    sums: list[Tensor] = []
    codes = [_prefix_logits(model, state_RS, sums).argmax(dim=-1)]
    while len(codes) < model.config.depth:
        chosen_RC = table_KC[codes[-1]]
        sums.append(sums[-1] + chosen_RC if sums else chosen_RC)
        codes.append(_prefix_logits(model, state_RS, sums).argmax(dim=-1))
    return torch.stack(codes, dim=-1)


def _prefix_logits(model: DepthTransformer, state_RS: Tensor, sums: Sequence[Tensor]) -> Tensor:
    empty = state_RS.new_zeros(len(state_RS), 0, model.config.code_width)
    return model.recomputed(state_RS, torch.stack(list(sums), dim=1) if sums else empty)


def _listed(scales: tuple[int, ...]) -> str:
    return " ".join(map(str, scales))
