"""What a message asks of a pipeline that makes pictures."""

from gesso_contracts import messages as m
from gesso_core.lora.library import LoraUse
from gesso_core.pipelines.recipe import GenerationRequest

SAME = (
    *("prompt", "negative_prompt", "width", "height", "seed", "steps", "sampler"),
    *("guidance_scale", "top_k", "top_p"),
)


def wish_of(request: m.GenerateImage, *, keep: int | None = None) -> GenerationRequest:
    """The message as a pipeline takes it; ``keep`` scales or rows of a given picture stay."""
    loras = tuple(LoraUse(name=use.name, strength=use.strength) for use in request.loras)
    wished = {name: getattr(request, name) for name in SAME}
    return GenerationRequest(**wished, loras=loras, keep=keep)
