"""A request for a picture becomes a recipe; what HART cannot do is refused by the field."""

from dataclasses import dataclass

from gesso_core.errors import InvalidRequest
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.generation import DrawOptions
from gesso_core.pipelines.hart_draft import HartRecipe
from gesso_core.pipelines.recipe import (
    GenerationRequest,
    check_prompt,
    check_seed,
    check_size,
    chosen_guidance,
    refuse_denoising_options,
)
from gesso_core.registry import ModelEntry


@dataclass(frozen=True, kw_only=True)
class HartDefaults:
    """How a checkpoint is best drawn from; a checkpoint may bring its own."""

    top_k: int | None = None  # None: 600 at the first seven scales, then 300
    top_p: float = 0.0  # 0: off
    smooth: bool = True
    temperature: float = 1.0  # of the residual's noise


def hart_recipe(
    request: GenerationRequest,
    entry: ModelEntry,
    config: HARTConfig,
    *,
    size: int,
    prompt_tokens: int,
    defaults: HartDefaults,
) -> HartRecipe:
    """Every choice made.

    Args:
        request: what is asked for.
        entry: the model's.
        config: of the transformer.
        size: side of its pictures in pixels.
        prompt_tokens: number of tokens of the prompt.
        defaults: what is not asked for.

    Raises:
        InvalidRequest: naming the first field that this model refuses.
    """
    refuse_denoising_options(request, entry, "scale by scale")
    check_prompt(request)
    if prompt_tokens > config.context_tokens:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens; {entry.name} reads {config.context_tokens}: "
            "shorten it",
            field="prompt",
        )
    check_size(entry, request.height, request.width)
    if request.width != request.height:
        raise InvalidRequest(
            f"{entry.name} draws squares of {size} pixels; ask for a width equal to the height, "
            f"not {request.width}x{request.height}",
            field="width",
        )
    check_seed(request)
    return HartRecipe(
        model=entry.name,
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        model_size=(size, size),
        latent_shape=(config.latent_channels, config.side, config.side),
        seed=request.seed,
        steps=len(config.scales),
        guidance_scale=chosen_guidance(request, entry, off=0),
        options=DrawOptions(
            top_k=_top_k(request, config, defaults),
            top_p=_top_p(request, defaults),
            smooth=defaults.smooth,
            temperature=defaults.temperature,
        ),
        keep=checked_keep(request.keep, config),
    )


def checked_keep(keep: int | None, config: HARTConfig) -> int | None:
    """How many scales of a given picture stay; at least the last one is drawn."""
    scales = len(config.scales)
    if keep is not None and not 0 <= keep < scales:
        raise InvalidRequest(
            f"keep {keep}; of a picture 0 to {scales - 1} of its {scales} scales can be kept",
            field="keep",
        )
    return keep


def _top_k(request: GenerationRequest, config: HARTConfig, defaults: HartDefaults) -> int | None:
    if request.top_k is None:
        return defaults.top_k
    if request.top_k < 1:
        raise InvalidRequest(
            f"top_k {request.top_k}; draw from at least 1 code, {config.vocabulary} are all",
            field="top_k",
        )
    return min(request.top_k, config.vocabulary)


def _top_p(request: GenerationRequest, defaults: HartDefaults) -> float:
    top_p = defaults.top_p if request.top_p is None else request.top_p
    if not 0 <= top_p <= 1:
        raise InvalidRequest(f"top_p {top_p}; allowed are 0 to 1, where 0 is off", field="top_p")
    return float(top_p)
