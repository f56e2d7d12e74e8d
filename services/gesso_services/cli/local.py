"""``gesso generate --local``: the pipeline in this process, without broker, Ray or gateway."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gesso_core.pipelines.pictures import encode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import PictureStep, TextToImage
from gesso_core.registry import MODELS

from gesso_services.client import Picture, Progress
from gesso_services.gateway.schemas import pixels_of

DEFAULT_MODEL = "sana-tiny"
MADE = ("model", "revision", "weights_sha256", "sampler", "steps", "guidance_scale", "in_domain")


def generate_here(
    prompt: str, options: dict[str, Any], on_progress: Callable[[Progress], None]
) -> list[Picture]:
    """The pictures that a server would have made for the same options.

    ``model`` may be the folder of a pipeline here, as well as a name.
    """
    pipeline = _load(options["model"] or DEFAULT_MODEL)
    side = pipeline.denoiser.entry.native_size
    width, height = pixels_of(options["size"], (side, side))
    seed = secrets.randbelow(2**32) if options["seed"] is None else options["seed"]
    names = ("negative_prompt", "steps", "guidance_scale", "sampler")
    wish = {name: options[name] for name in names}
    requests = [
        GenerationRequest(prompt=prompt, width=width, height=height, seed=seed + index, **wish)
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
            | {"suggestions": list(made.provenance.suggestions)},
        )
        for made in pictures
    ]


def _load(name: str) -> TextToImage:
    folder = Path(name)
    return TextToImage.load(folder if name not in MODELS and folder.is_dir() else name)
