"""What made a picture, and what is loaded, as messages."""

from typing import cast

from gesso_contracts import messages as m
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.provenance import Provenance
from gesso_core.registry import ModelEntry


def provenance_message(made: Provenance) -> m.Provenance:
    """The provenance as it travels with a picture."""
    return m.Provenance(
        model=made.model,
        revision=made.revision,
        weights_sha256=made.weights_sha256,
        sampler=cast("m.SamplerName", made.sampler),
        steps=made.steps,
        guidance_scale=made.guidance_scale,
        quantization=made.quantization,
        versions=dict(made.versions),
        in_domain=made.in_domain,
        suggestions=list(made.suggestions),
        loras=[
            m.LoraUsed(name=lora.name, strength=lora.strength, sha256=lora.sha256)
            for lora in made.loras
        ],
        top_k=made.top_k,
        top_p=made.top_p,
        keep=made.keep,
    )


def in_use(entry: ModelEntry, identity: Identity) -> m.ModelInUse:
    """How a loaded model computes, and what it takes."""
    return m.ModelInUse(
        quantization=identity.quantization,
        weight_bytes=identity.weight_bytes,
        native_size=entry.native_size,
        tasks=list(entry.tasks),
        steps=entry.steps,
    )
