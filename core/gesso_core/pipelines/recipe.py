"""What a person asks for, and the recipe it becomes once a model has filled in its defaults.

Everything that a model cannot do is refused here, at the door, naming the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal

from gesso_core.errors import InvalidRequest
from gesso_core.lora.library import LoraUse
from gesso_core.registry import ModelEntry
from gesso_core.sampling.aspect_ratio import aspect_table, bin_for

Guidance = Literal["none", "classifier-free", "embedded"]

FLOW_SAMPLERS = ("flow-dpm-solver", "flow-euler")
CONSISTENCY_SAMPLERS = ("scm",)
MAX_STEPS: Mapping[str, int] = {"flow-dpm-solver": 100, "flow-euler": 100, "scm": 20}
MAX_GUIDANCE = 30.0
MIN_SIDE = 16
# A picture is drawn at the model's own size and then resized; beyond twice that it is only blur.
MAX_ENLARGEMENT = 2
MAX_LORAS = 4
MAX_LORA_STRENGTH = 4.0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A picture wanted. Sides in pixels; what is None takes the model's default.

    The last three are for models that draw tokens: ``top_k`` and ``top_p`` filter each draw, and
    ``keep`` is how many steps of a given picture (scales, or rows) stay as they are.
    """

    prompt: str
    width: int
    height: int
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    loras: tuple[LoraUse, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A request with every choice made.

    The picture is drawn at ``model_size`` (height, width) and brought to ``height`` x ``width``
    afterwards; ``latent_shape`` is (C, h, w).
    """

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    model_size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    guidance: Guidance
    loras: tuple[LoraUse, ...] = ()

    @property
    def pixels(self) -> int:
        """Pixels of the picture as the model draws it."""
        return self.model_size[0] * self.model_size[1]


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What the autoencoder fixes: pixels per latent side, channels, and what a patch adds."""

    compression: int
    channels: int
    patch: int = 1


def make_recipe(
    request: GenerationRequest, entry: ModelEntry, canvas: Canvas, *, guidance_embedding: bool
) -> Recipe:
    """The recipe of a request; InvalidRequest names the first field that this model refuses."""
    check_prompt(request)
    _refuse_token_options(request, entry)
    sampler = _sampler(request, entry, guidance_embedding)
    guidance_scale = chosen_guidance(request, entry)
    if guidance_embedding and request.negative_prompt:
        raise InvalidRequest(
            f"{entry.name} is distilled and cannot avoid a negative prompt; leave it empty",
            field="negative_prompt",
        )
    check_seed(request)
    height, width = model_size(entry, canvas, request.height, request.width)
    return Recipe(
        model=entry.name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        model_size=(height, width),
        latent_shape=(canvas.channels, height // canvas.compression, width // canvas.compression),
        seed=request.seed,
        sampler=sampler,
        steps=_steps(request, entry, sampler),
        guidance_scale=guidance_scale,
        guidance=_guidance(guidance_scale, guidance_embedding),
        loras=_loras(request),
    )


def allowed_samplers(*, guidance_embedding: bool) -> tuple[str, ...]:
    """Consistency models (with a guidance input) need theirs, flow models take either of two."""
    return CONSISTENCY_SAMPLERS if guidance_embedding else FLOW_SAMPLERS


def model_size(entry: ModelEntry, canvas: Canvas, height: int, width: int) -> tuple[int, int]:
    """The (height, width) at which the model draws a picture of ``height`` x ``width``.

    The aspect-ratio bin where the model has a table, otherwise the same proportions at the
    model's own area, in whole patches of the latent.
    """
    check_size(entry, height, width)
    if entry.aspect_bins is not None:
        return bin_for(height, width, aspect_table(entry.aspect_bins))
    unit = canvas.compression * canvas.patch
    scale = entry.native_size / sqrt(height * width) / unit
    return max(1, round(height * scale)) * unit, max(1, round(width * scale)) * unit


def check_size(entry: ModelEntry, height: int, width: int) -> None:
    """Refuse pictures that are tiny, very long, or far larger than the model draws."""
    for field, side in (("height", height), ("width", width)):
        if side < MIN_SIDE:
            raise InvalidRequest(f"{field} {side} is below {MIN_SIDE} pixels", field=field)
    longest, shortest = max(height, width), min(height, width)
    field = "height" if height >= width else "width"
    if longest > 4 * shortest:
        raise InvalidRequest(
            f"{width}x{height} is longer than 4 to 1; ask for proportions up to that", field=field
        )
    most = MAX_ENLARGEMENT * entry.native_size
    if height * width > most**2:
        raise InvalidRequest(
            f"{width}x{height} is too large for {entry.name}, which draws at {entry.native_size} "
            f"pixels; ask for at most {most}x{most} or as many pixels in other proportions",
            field=field,
        )


def check_prompt(request: GenerationRequest) -> None:
    """Refuse a prompt without a word."""
    if not request.prompt.strip():
        raise InvalidRequest("the prompt is empty; say what to paint", field="prompt")


def check_seed(request: GenerationRequest) -> None:
    """Refuse a seed that is no number of 63 bits."""
    if not 0 <= request.seed < 2**63:
        raise InvalidRequest(f"seed {request.seed} is not in 0..2^63-1", field="seed")


def chosen_guidance(request: GenerationRequest, entry: ModelEntry, *, off: int = 1) -> float:
    """The strength of guidance; ``off`` is the one that the model draws without guidance at."""
    scale = entry.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if not 0 <= scale <= MAX_GUIDANCE:
        raise InvalidRequest(
            f"guidance scale {scale}; allowed are 0 to {MAX_GUIDANCE:g}, where {off} means no "
            "guidance",
            field="guidance_scale",
        )
    return float(scale)


def refuse_denoising_options(request: GenerationRequest, entry: ModelEntry, drawn: str) -> None:
    """Refuse what only diffusion models choose; ``drawn`` is how this one draws."""
    given = {
        "negative_prompt": bool(request.negative_prompt),
        "steps": request.steps is not None,
        "sampler": request.sampler not in (None, entry.sampler),
        "loras": bool(request.loras),
    }
    for field, is_given in given.items():
        if is_given:
            raise InvalidRequest(
                f"{entry.name} draws {drawn} and has no use for {field}; leave it out",
                field=field,
            )


def _refuse_token_options(request: GenerationRequest, entry: ModelEntry) -> None:
    for field in ("top_k", "top_p", "keep"):
        if getattr(request, field) is not None:
            raise InvalidRequest(
                f"{entry.name} draws no tokens, so {field} means nothing to it; leave it out",
                field=field,
            )


def _sampler(request: GenerationRequest, entry: ModelEntry, guidance_embedding: bool) -> str:
    allowed = allowed_samplers(guidance_embedding=guidance_embedding)
    sampler = entry.sampler if request.sampler is None else request.sampler
    if sampler not in allowed:
        raise InvalidRequest(
            f"{entry.name} cannot use the sampler {sampler[:80]!r}; use {' or '.join(allowed)}",
            field="sampler",
        )
    return sampler


def _steps(request: GenerationRequest, entry: ModelEntry, sampler: str) -> int:
    steps, most = request.steps or entry.steps, MAX_STEPS[sampler]
    if request.steps is not None and not 1 <= request.steps <= most:
        raise InvalidRequest(
            f"{request.steps} steps; {sampler} takes 1 to {most}, {entry.steps} is usual for "
            f"{entry.name}",
            field="steps",
        )
    return steps


def _guidance(scale: float, guidance_embedding: bool) -> Guidance:
    if guidance_embedding:
        return "embedded"
    return "none" if scale == 1.0 else "classifier-free"


def _loras(request: GenerationRequest) -> tuple[LoraUse, ...]:
    names = [use.name for use in request.loras]
    if len(names) > MAX_LORAS or len(set(names)) < len(names):
        raise InvalidRequest(
            f"{len(names)} LoRAs ({', '.join(name[:40] for name in names[:8])}); "
            f"ask for at most {MAX_LORAS}, each once",
            field="loras",
        )
    for use in request.loras:
        if not (isfinite(use.strength) and abs(use.strength) <= MAX_LORA_STRENGTH):
            raise InvalidRequest(
                f"strength {use.strength} of the LoRA {use.name[:80]!r}; allowed are "
                f"-{MAX_LORA_STRENGTH:g} to {MAX_LORA_STRENGTH:g}, where 1 is what it was made for",
                field="loras",
            )
    return request.loras
