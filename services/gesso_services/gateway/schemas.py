"""Bodies of the HTTP API: OpenAI's image vocabulary, with what gesso adds to it.

Prompts, sizes and numbers carry the limits of the bus messages, so OpenAPI shows them too.
"""

import re
from typing import Annotated, Literal

from fastapi import UploadFile
from gesso_contracts import ImageFormat, JobState, Provenance, SamplerName, limits
from gesso_contracts.base import LoraStrength, ModelName, Prompt, Token
from gesso_contracts.messages import TopK, TopP
from gesso_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_PICTURES = 10
MAX_CANDIDATES = limits.PICTURES_PER_JUDGEMENT
MAX_PARTIAL_IMAGES = 10

Size = Annotated[
    str,
    StringConstraints(pattern=r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"),
    Field(description="`WIDTHxHEIGHT` in pixels, or `auto` for the model's own size"),
]
Seed = Annotated[int, Field(ge=0, lt=limits.SEED_LIMIT)]
Guidance = Annotated[float, Field(ge=0, le=limits.MAX_GUIDANCE, allow_inf_nan=False)]
PartialImages = Annotated[
    int,
    Field(ge=0, le=MAX_PARTIAL_IMAGES, description="previews per picture, with `stream`"),
]
ResponseFormat = Literal["b64_json", "url"]
TOKENS_ONLY = "for models that draw tokens"
NOT_USED = "accepted and not used"


class Body(BaseModel):
    """A request body; a field it does not know is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Lora(Body):
    """A LoRA from the folder of the server, and how strongly it counts."""

    name: Token
    strength: LoraStrength = 1.0


class ImageRequest(Body):
    """``POST /v1/images/generations``; what is left out takes the model's own default."""

    model: ModelName | None = Field(None, description="default: the first of /v1/models")
    prompt: Prompt
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="picture i has seed + i")
    size: Size = "auto"
    negative_prompt: Annotated[str, StringConstraints(max_length=limits.PROMPT_CHARS)] = ""
    seed: Seed | None = Field(None, description="drawn by the gateway when left out")
    steps: int | None = Field(None, ge=1, le=limits.MAX_STEPS)
    guidance_scale: Guidance | None = None
    sampler: SamplerName | None = None
    top_k: TopK | None = Field(None, description=TOKENS_ONLY)
    top_p: TopP | None = Field(None, description=TOKENS_ONLY)
    loras: list[Lora] = Field(
        default_factory=list,
        max_length=limits.MAX_LORAS,
        description="files of the server's LoRA folder by name, each once",
    )
    best_of: int | None = Field(
        None, ge=1, le=MAX_CANDIDATES, description="draw so many and give back the best n"
    )
    judge: ModelName | None = Field(
        None, description="who chooses, with `best_of`; default: the first model that sees"
    )
    response_format: ResponseFormat = "b64_json"
    output_format: ImageFormat = "png"
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: PartialImages = 0
    user: str | None = Field(None, max_length=200, description=NOT_USED)


class VariationRequest(BaseModel):
    """``POST /v1/images/variations`` as a form: OpenAI's fields, and what gesso adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: UploadFile = Field(description="PNG, JPEG or WebP")
    model: ModelName | None = Field(None, description="default: the first that can")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="picture i has seed + i")
    size: Size = "auto"
    response_format: ResponseFormat = "b64_json"
    user: str | None = Field(None, max_length=200, description=NOT_USED)
    prompt: Prompt | None = Field(None, description="what the new picture shall show")
    keep: int | None = Field(
        None,
        ge=0,
        le=limits.MAX_KEEP,
        description="scales or rows that stay as they are; default: half of the scales, or 0 for "
        "a model that sees, which then looks at the picture and draws anew",
    )
    seed: Seed | None = Field(None, description="drawn by the gateway when left out")
    guidance_scale: Guidance | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    output_format: ImageFormat = "png"
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: PartialImages = 0


class JudgementRequest(Body):
    """``POST /v1/judgements``: how well does each picture show what the prompt asks for?"""

    model: ModelName | None = Field(None, description="default: the first model that sees")
    prompt: Prompt
    images: list[str] = Field(
        min_length=1,
        max_length=limits.PICTURES_PER_JUDGEMENT,
        description="pictures as base64, or as data: URLs; no other URL is opened",
    )


class Judgement(BaseModel):
    """One score per picture: the probability that the model says yes."""

    object: Literal["judgement"] = "judgement"
    created: int = Field(description="Unix seconds")
    model: str
    scores: list[float]


class Metadata(Provenance):
    """What made the pictures, and whether the model knows what the prompt names."""


class Score(BaseModel):
    """What the judge of a best-of-N says of one picture."""

    score: float = Field(description="probability that it shows what the prompt asks for")
    judge: str


class ImageData(BaseModel):
    """One picture: its bytes, or where they are."""

    b64_json: str | None = None
    url: str | None = Field(None, description="below this server; lives as long as the job does")
    seed: int
    job_id: str
    metadata: Score | None = Field(None, description="with `best_of`")


class ImagesResponse(BaseModel):
    """OpenAI's answer, with what made the pictures."""

    created: int = Field(description="Unix seconds")
    data: list[ImageData]
    size: str
    output_format: ImageFormat
    metadata: Metadata


class ReconstructionResponse(BaseModel):
    """A picture through the autoencoder and back, measured against itself."""

    created: int
    b64_json: str
    output_format: ImageFormat
    size: str
    model: str
    psnr_db: float
    ssim: float


class Model(BaseModel):
    """One model that this server answers for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gesso"
    task: str = Field(description="what it is mainly for")
    tasks: list[str] = Field(description="all that it can do")
    default_size: str | None = None
    sizes: list[str] = Field(default_factory=list)
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    quantization: str | None = Field(
        default=None, description="format, rank and mode of quantized weights, `none` for others"
    )
    weight_bytes: int | None = Field(default=None, description="what the weights take in memory")
    missing: str | None = Field(
        default=None, description="why it cannot be used now, and what to do about it"
    )


class ModelList(BaseModel):
    """All models that this server answers for."""

    object: Literal["list"] = "list"
    data: list[Model]


class JobPage(BaseModel):
    """One page of jobs, last changed first."""

    object: Literal["list"] = "list"
    data: list[JobState]
    next_cursor: str | None = Field(None, description="give it back as `cursor`")


class ServiceHealth(BaseModel):
    """One service, as the gateway sees it."""

    ready: bool
    models: list[str] = Field(default_factory=list)
    missing: dict[str, str] = Field(
        default_factory=dict, description="models that cannot be used, and what to do about it"
    )
    detail: str


class Health(BaseModel):
    """``/health/ready``: true only after a real warm-up went through every required service."""

    ready: bool
    broker: bool
    services: dict[str, ServiceHealth]


def pixels_of(size: str, default: tuple[int, int]) -> tuple[int, int]:
    """Width and height of ``size``; ``default`` for ``auto``. Raises InvalidRequest outside."""
    if size == "auto":
        return default
    width, height = (int(side) for side in re.split("x", size))
    for side in (width, height):
        if not limits.MIN_SIDE <= side <= limits.MAX_SIDE or side % limits.SIDE_MULTIPLE:
            raise InvalidRequest(
                f"size {size!r}: each side must be a multiple of {limits.SIDE_MULTIPLE} from "
                f"{limits.MIN_SIDE} to {limits.MAX_SIDE} pixels; or send 'auto'",
                field="size",
            )
    return width, height
