"""Requests and answers of the services. A request is an imperative, an answer a past participle.

Tensors are safetensors bytes; pictures are PNG, JPEG or WebP bytes. Sides are pixels.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from gesso_contracts import limits
from gesso_contracts.base import LoraStrength, Message, ModelName, Prompt, Sha256, Side, Token
from gesso_contracts.blobs import BlobRef, Payload

ImageFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "webp", "gif"]
SamplerName = Literal["flow-dpm-solver", "flow-euler", "scm", "next-scale", "next-token"]
TopK = Annotated[int, Field(ge=1, le=limits.MAX_TOP_K)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class LoraUse(Message):
    """A LoRA from the folder of the service; at strength 1 it works as it was made to."""

    name: Token
    strength: LoraStrength = 1.0


class LoraUsed(LoraUse):
    """Which bytes that name stood for."""

    sha256: Sha256


class GenerateImage(Message):
    """Text in, one picture out. What is ``None`` takes the model's own default."""

    model: ModelName
    prompt: Prompt
    negative_prompt: Annotated[str, StringConstraints(max_length=limits.PROMPT_CHARS)] = ""
    width: Side
    height: Side
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT)
    steps: int | None = Field(default=None, ge=1, le=limits.MAX_STEPS)
    guidance_scale: float | None = Field(
        default=None, ge=0, le=limits.MAX_GUIDANCE, allow_inf_nan=False
    )
    sampler: SamplerName | None = None
    output_format: ImageFormat = "png"
    preview_every: int = Field(
        default=0, ge=0, le=limits.MAX_STEPS, description="steps; 0 for no preview"
    )
    loras: list[LoraUse] = Field(default_factory=list, max_length=limits.MAX_LORAS)
    top_k: TopK | None = Field(default=None, description="for models that draw tokens")
    top_p: TopP | None = Field(default=None, description="for models that draw tokens")


class VaryImage(GenerateImage):
    """A picture in, another one out that keeps its first ``keep`` scales or rows.

    With ``keep`` 0 a model that sees pictures looks at it and draws anew.
    """

    image: Payload
    keep: int = Field(ge=0, le=limits.MAX_KEEP)


class GenerateVideo(Message):
    """Text in, one short video out. What is ``None`` takes the model's own default."""

    model: ModelName
    prompt: Prompt
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT)
    guidance_scale: float | None = Field(
        default=None, ge=0, le=limits.MAX_GUIDANCE, allow_inf_nan=False
    )
    top_k: TopK | None = None
    top_p: TopP | None = None
    frames_per_s: int = Field(default=8, ge=1, le=limits.MAX_FRAMES_PER_S)
    output_format: VideoFormat = "mp4"
    preview_every: int = Field(
        default=0, ge=0, le=limits.MAX_STEPS, description="steps; 0 for no preview"
    )


class Provenance(Message):
    """What made a picture; enough to make it again."""

    model: ModelName
    revision: str
    weights_sha256: Sha256
    sampler: SamplerName
    steps: int = Field(ge=1)
    guidance_scale: float
    quantization: str = "none"
    versions: dict[str, str] = Field(default_factory=dict)
    in_domain: bool | None = Field(
        default=None, description="does the model know what the prompt names?"
    )
    suggestions: list[str] = Field(default_factory=list)
    loras: list[LoraUsed] = Field(default_factory=list, max_length=limits.MAX_LORAS)
    top_k: TopK | None = Field(default=None, description="of models that draw tokens")
    top_p: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="of models that draw tokens"
    )
    keep: int | None = Field(
        default=None, ge=0, le=limits.MAX_KEEP, description="steps kept of a given picture"
    )


class ImageReady(Message):
    """A finished picture."""

    image: BlobRef
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT)
    provenance: Provenance


class VideoReady(Message):
    """A finished video."""

    video: BlobRef
    frames: int = Field(ge=1)
    frames_per_s: int = Field(ge=1)
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT)
    provenance: Provenance


class EncodeImage(Message):
    """Picture in, latent out."""

    model: ModelName
    image: Payload


class ImageEncoded(Message):
    """``latent``: tensor ``latent`` of shape C, H/f, W/f."""

    latent: Payload


class DecodeLatent(Message):
    """Latent in, picture out; with ``height`` and ``width`` the picture is cropped to that size."""

    model: ModelName
    latent: Payload
    height: int | None = Field(default=None, ge=1, le=limits.MAX_SIDE)
    width: int | None = Field(default=None, ge=1, le=limits.MAX_SIDE)
    output_format: ImageFormat = "png"


class LatentDecoded(Message):
    """The picture of a latent."""

    image: Payload
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Reconstruct(Message):
    """A picture through encoder and decoder, measured against itself."""

    model: ModelName
    image: Payload
    output_format: ImageFormat = "png"


class Reconstructed(Message):
    """The round trip and its quality; PSNR of identical pictures is reported as 100 dB."""

    image: Payload
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    psnr_db: float = Field(le=100, allow_inf_nan=False)
    ssim: float = Field(ge=-1, le=1, allow_inf_nan=False)


class EmbedText(Message):
    """Prompts in, states of the text encoder out."""

    model: ModelName
    prompts: list[Prompt] = Field(min_length=1, max_length=limits.PROMPTS_PER_CALL)


class TextEmbedded(Message):
    """``states``: tensors ``states`` (B, L, C) and ``mask`` (B, L)."""

    states: Payload


class AskReady(Message):
    """Are you ready to work?"""


class ModelInUse(Message):
    """How one loaded model computes, and what its weights take in memory."""

    quantization: str = Field(
        default="none", max_length=100, description="format, rank and mode of quantized weights"
    )
    weight_bytes: int = Field(ge=0)
    native_size: int = Field(ge=1, description="pixels along one side of what it draws best")
    tasks: list[Token] = Field(
        default_factory=list, max_length=16, description="what it can do, the main one first"
    )
    steps: int | None = Field(default=None, ge=1, description="in how many it draws by default")


class ServiceReady(Message):
    """One replica's answer; it answers only after a real request went through its handler."""

    version: ClassVar[int] = 2

    service: Token
    instance: str = Field(max_length=100)
    ready: bool
    models: list[str] = Field(default_factory=list)
    slots: int = Field(ge=0, description="jobs that may run at once")
    running: int = Field(ge=0, description="jobs that run now")
    in_use: dict[ModelName, ModelInUse] = Field(
        default_factory=dict, description="by model, as far as the service tells"
    )
    missing: dict[ModelName, str] = Field(
        default_factory=dict, description="models that cannot be used, and what to do about it"
    )


class AskMetrics(Message):
    """Give me your Prometheus metrics."""


class MetricsText(Message):
    """Metrics of one replica in the Prometheus text format."""

    text: str
