"""``gesso generate --local``: the pipeline in this process, without broker, Ray or gateway."""

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gesso_core.hub.store import SHIPPED_LORAS
from gesso_core.lora.library import LoraUse
from gesso_core.pipelines.pictures import encode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import PictureStep, TextToImage

from gesso_services.cli.common import name_or_folder
from gesso_services.client import Picture, Progress
from gesso_services.gateway.schemas import pixels_of

DEFAULT_MODEL = "sana-tiny"
MADE = ("model", "revision", "weights_sha256", "sampler", "steps", "guidance_scale", "in_domain")


def generate_here(
    prompt: str,
    options: dict[str, Any],
    on_progress: Callable[[Progress], None],
    lora_folder: Path | None = None,
) -> list[Picture]:
    """The pictures that a server would have made for the same options.

    ``model`` may be the folder of a pipeline here, as well as a name.
    """
    pipeline = _load(options["model"] or DEFAULT_MODEL, lora_folder)
    side = pipeline.denoiser.entry.native_size
    width, height = pixels_of(options["size"], (side, side))
    seed = secrets.randbelow(2**32) if options["seed"] is None else options["seed"]
    names = ("negative_prompt", "steps", "guidance_scale", "sampler")
    wish = {name: options[name] for name in names}
    loras = tuple(LoraUse(**use) for use in options.get("loras") or ())
    requests = [
        GenerationRequest(
            prompt=prompt, width=width, height=height, seed=seed + index, loras=loras, **wish
        )
        for index in range(options["n"])
    ]

    def told(at: PictureStep) -> None:
        on_progress(Progress(at.request, at.index, at.total, at.index / at.total))

    pictures = pipeline(*requests, on_step=told)
    return [
        Picture(
            data=encode_picture(made.pixels_HWC, options["output_format"]),
            output_format=options["output_format"],
            seed=made.seed,
            job_id="local",
            metadata={name: getattr(made.provenance, name) for name in MADE}
            | {
                "suggestions": list(made.provenance.suggestions),
                "loras": [asdict(use) for use in made.provenance.loras],
            },
        )
        for made in pictures
    ]


def _load(name: str, lora_folder: Path | None) -> TextToImage:
    return TextToImage.load(name_or_folder(name), lora_folder=lora_folder or SHIPPED_LORAS)
