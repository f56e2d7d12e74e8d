"""Bodies of ``/v1/annotations``: forms that carry a picture, and what comes back.

A field that is a list (prompts, words) is JSON inside the form. What is to be drawn brings no
picture along and is JSON altogether.
"""

from typing import Annotated, Literal

from fastapi import UploadFile
from gesso_contracts import (
    AnnotatedWord,
    AnnotationProvenance,
    CarOutcome,
    CarPrompt,
    PromptSpec,
    Provenance,
    SegmentedMask,
    TextSummary,
    limits,
)
from gesso_contracts.annotations import DrivingSide, Refine, Share, SignWord, Voxel, Words
from gesso_contracts.base import ModelName, Prompt
from pydantic import BaseModel, ConfigDict, Field, Json

from gesso_services.gateway.schemas import Body, Size

WAIT = "answer when it is done; else at once, with the job and 202"


class AnnotationForm(BaseModel):
    """What all of them take; a field that is not known is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: UploadFile = Field(
        description="PNG, JPEG or WebP; coordinates count in it as it stands upright"
    )
    model: ModelName | None = Field(None, description="default: the first that can")


class SegmentForm(AnnotationForm):
    """``POST /v1/annotations/segment``: boxes and clicks to masks."""

    prompts: Json[
        Annotated[list[PromptSpec], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
    ] = Field(
        description=f"JSON list of 1 to {limits.MAX_PROMPTS} prompts: "
        '[{"points": [[x, y]], "labels": [1]}] or [{"box": [x0, y0, x1, y1]}]'
    )
    multimask: bool = Field(False, description="always choose the best of three proposals")


class TextForm(AnnotationForm):
    """``POST /v1/annotations/text``: words to the masks of their characters."""

    words: Json[Words | None] = Field(
        None,
        description="JSON list of {text, polygon, script?, ignore?}; left out: a reader finds them",
    )
    refine: Refine = "colour"
    min_score: Share = Field(0.3, description="characters below it are refused")
    wait: bool = Field(True, description=WAIT)


class CarsForm(AnnotationForm):
    """``POST /v1/annotations/cars``: cars of a frame to boxes in space."""

    calibration: UploadFile = Field(description="KITTI calib file: P2, R0_rect, Tr_velo_to_cam")
    points: UploadFile | None = Field(
        None, description="LiDAR returns as KITTI has them: x, y, z, reflectance in float32"
    )
    prompts: Json[Annotated[list[CarPrompt], Field(min_length=1, max_length=limits.MAX_CARS)]] = (
        Field(
            description=f"JSON list of 1 to {limits.MAX_CARS} prompts: "
            '[{"box": [x0, y0, x1, y1]}] or [{"point": [x, y]}]'
        )
    )
    driving_side: DrivingSide = "right"
    meshes: bool = Field(False, description="also the fitted surfaces, as GLB")
    occupancy: Voxel | None = Field(
        None, description="also the filled voxels of this size in metres, as PLY points"
    )
    wait: bool = Field(True, description=WAIT)


class DrawBody(Body):
    """``POST /v1/annotations/draw``: signs drawn, written on and labelled."""

    prompt: Prompt = Field(description="what is drawn behind the sign")
    words: list[SignWord] = Field(
        min_length=1, max_length=limits.MAX_SIGN_WORDS, description="what the sign says, by line"
    )
    n: int = Field(1, ge=1, le=limits.MAX_SIGNS, description="picture i has seed + i")
    seed: int | None = Field(
        None,
        ge=0,
        lt=limits.SEED_LIMIT - limits.MAX_SIGNS,
        description="drawn by the gateway when left out",
    )
    size: Size = "auto"
    generator: ModelName | None = Field(
        None, description="a model of the diffusion service; default: the one that draws by default"
    )
    model: ModelName | None = Field(None, description="who labels; default: the first that can")
    refine: Refine = "colour"
    min_score: Share = Field(0.3, description="characters below it are refused")
    wait: bool = Field(True, description=WAIT)


class SegmentAnswer(BaseModel):
    """One mask per prompt, in their order."""

    object: Literal["annotation.masks"] = "annotation.masks"
    created: int = Field(description="Unix seconds")
    model: str
    width: int
    height: int
    cached: bool = Field(description="nothing had to be looked at anew")
    masks: list[SegmentedMask]


class Annotation(BaseModel):
    """What every finished annotation tells. Paths are those of this server."""

    id: str = Field(description="of the job behind it")
    created: int = Field(description="Unix seconds")
    name: str | None = None
    width: int
    height: int
    flagged: dict[str, int] = Field(description="how often a person should look, by reason")
    refused: dict[str, int] = Field(description="how often there is no label, by reason")
    overlay: str = Field(description="path of a picture to look at")
    exports: dict[str, str] = Field(description="paths of the files, by format")
    provenance: AnnotationProvenance


class TextAnnotation(Annotation):
    """Words with the masks of their characters."""

    object: Literal["annotation.text"] = "annotation.text"
    transcription: Literal["given", "ocr"]
    summary: TextSummary
    words: list[AnnotatedWord]


class CarsAnnotation(Annotation):
    """One outcome per prompt, in their order."""

    object: Literal["annotation.cars"] = "annotation.cars"
    cars: int
    birds_eye: str = Field(description="path of the scene from above")
    meshes: str | None = Field(None, description="path of the surfaces")
    occupancy: str | None = Field(None, description="path of the filled voxels")
    objects: list[CarOutcome]


class SignAnnotation(BaseModel):
    """One picture with its sign. Paths are those of this server."""

    index: int
    name: str = Field(description="of its file in exports")
    seed: int
    job: str = Field(description="that drew what is behind the sign")
    image: str
    overlay: str
    truth: str = Field(description="path of the index mask of the characters as they were set")
    agreement: float = Field(description="foreground IoU of the labels with the truth")
    summary: TextSummary
    words: list[AnnotatedWord]


class SignsAnnotation(BaseModel):
    """Signs that were drawn and labelled."""

    object: Literal["annotation.signs"] = "annotation.signs"
    id: str = Field(description="of the job behind it")
    created: int = Field(description="Unix seconds")
    width: int
    height: int
    words: list[str]
    text: Literal["composed"] = Field(
        description="the words were set by a font and put into the pictures; no model drew them"
    )
    agreement: float = Field(description="mean over the pictures")
    exports: dict[str, str] = Field(description="paths of the files, by format")
    generator: Provenance = Field(description="what drew the pictures")
    provenance: AnnotationProvenance = Field(description="what made the labels")
    pictures: list[SignAnnotation]
