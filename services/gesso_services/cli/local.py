"""``gesso generate --local`` and ``vary --local``: pipelines in this process, without a server."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gesso_core.errors import InvalidRequest
from gesso_core.hub.store import SHIPPED_LORAS
from gesso_core.lora.library import LoraUse
from gesso_core.pipelines.draw import DrawPicture, family_of
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import Picture as Made
from gesso_core.pipelines.text_to_image import PictureStep, TextToImage
from gesso_core.registry import ModelEntry

from gesso_services.cli.common import name_or_folder
from gesso_services.client import Picture, Progress
from gesso_services.gateway.orders import RANDOM_SEEDS
from gesso_services.gateway.painting import kept
from gesso_services.gateway.schemas import pixels_of

DEFAULT_MODEL, DEFAULT_VARYING = "sana-tiny", "hart-tiny"
MADE = ("model", "revision", "weights_sha256", "sampler", "steps", "guidance_scale", "in_domain")
Tell = Callable[[Progress], None]
Judge = Callable[[Sequence[Pixels]], list[float]]


def generate_here(
    prompt: str, options: dict[str, Any], on_progress: Tell, lora_folder: Path | None = None
) -> list[Picture]:
    """The pictures that a server would have made for the same options.

    ``model`` may be the folder of a model here, as well as a name.
    """
    pipeline = _load(options["model"] or DEFAULT_MODEL, lora_folder)
    entry = pipeline.denoiser.entry if isinstance(pipeline, TextToImage) else pipeline.model.entry
    loras = tuple(LoraUse(**use) for use in options.get("loras") or ())
    names = ("negative_prompt", "steps", "guidance_scale", "sampler", "top_k", "top_p")
    wish = {name: options[name] for name in names}
    count = _count(options)
    requests = _requests(prompt, options, entry, count, loras=loras, **wish)
    judge = None if options["best_of"] is None else _judge_of(prompt, options["judge"])
    made = pipeline(*requests, on_step=_told(on_progress))
    if judge is not None:
        return _best(made, judge, options)
    return [_picture(one, options) for one in made]


def vary_here(
    image: bytes, prompt: str, options: dict[str, Any], on_progress: Tell
) -> list[Picture]:
    """The variations that a server would have made."""
    name = name_or_folder(options["model"] or DEFAULT_VARYING)
    if family_of(name) == "sana":
        raise InvalidRequest(
            f"{options['model']} starts from noise and cannot vary a picture; use hart-tiny or "
            "vilau-tiny",
            field="model",
        )
    pipeline = DrawPicture.load(name)
    entry = pipeline.model.entry
    keep = kept(options["keep"], entry)
    wish = {name: options[name] for name in ("guidance_scale", "top_k", "top_p")}
    wish["keep"] = None if pipeline.sees and not keep else keep
    requests = _requests(prompt, options, entry, options["n"], **wish)
    made = pipeline(*requests, image=decode_picture(image), on_step=_told(on_progress))
    return [_picture(one, options) for one in made]


def _load(name: str, lora_folder: Path | None) -> TextToImage | DrawPicture:
    model = name_or_folder(name)
    if family_of(model) in ("hart", "vila-u"):
        return DrawPicture.load(model)
    return TextToImage.load(model, lora_folder=lora_folder or SHIPPED_LORAS)


def _count(options: dict[str, Any]) -> int:
    count, best_of = int(options["n"]), options["best_of"]
    if best_of is not None and best_of < count:
        raise InvalidRequest(
            f"--best-of {best_of} is less than the {count} pictures asked for; draw at least as "
            "many",
            field="best_of",
        )
    return best_of or count


def _requests(
    prompt: str, options: dict[str, Any], entry: ModelEntry, count: int, **wish: Any
) -> list[GenerationRequest]:
    width, height = pixels_of(options["size"], (entry.native_size, entry.native_size))
    seed = secrets.randbelow(RANDOM_SEEDS) if options["seed"] is None else options["seed"]
    return [
        GenerationRequest(prompt=prompt, width=width, height=height, seed=seed + index, **wish)
        for index in range(count)
    ]


def _told(on_progress: Tell) -> Callable[[PictureStep], None]:
    def told(at: PictureStep) -> None:
        on_progress(Progress(at.request, at.index, at.total, at.index / at.total))

    return told


def _judge_of(prompt: str, name: str | None) -> Judge:
    """Scores by a model that sees, which is asked before anything is drawn whether it can."""
    from gesso_services.cli.local_seeing import load_seeing

    model = load_seeing(name)
    model.judging.question(prompt)
    return partial(model.judge, prompt=prompt)


def _best(made: Sequence[Made], judge: Judge, options: dict[str, Any]) -> list[Picture]:
    scores = judge([one.pixels_HWC for one in made])
    ranked = sorted(range(len(made)), key=lambda index: -scores[index])
    return [_picture(made[index], options, scores[index]) for index in ranked[: options["n"]]]


def _picture(made: Made, options: dict[str, Any], score: float | None = None) -> Picture:
    return Picture(
        data=encode_picture(made.pixels_HWC, options["output_format"]),
        output_format=options["output_format"],
        seed=made.seed,
        job_id="local",
        metadata={name: getattr(made.provenance, name) for name in MADE}
        | {
            "suggestions": list(made.provenance.suggestions),
            "loras": [asdict(use) for use in made.provenance.loras],
        },
        score=score,
    )
