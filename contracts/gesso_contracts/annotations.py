"""Annotation: clicks to masks, words to the masks of their characters, cars to boxes in space, and
signs that are drawn to be labelled.

Coordinates are pixels of the upright picture, x to the right and y down, whole numbers on pixel
edges. Pictures are PNG, JPEG or WebP bytes. What can grow with the picture (masks, overlays,
meshes) travels as blobs, so that the state of a job stays small.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from gesso_contracts import limits
from gesso_contracts.base import JobId, Message, ModelName, Prompt, Sha256, Side
from gesso_contracts.blobs import BlobRef, Payload
from gesso_contracts.messages import Provenance

Pixel = Annotated[
    float, Field(ge=-limits.MAX_COORDINATE, le=limits.MAX_COORDINATE, allow_inf_nan=False)
]
Point = tuple[Pixel, Pixel]
Box = tuple[Pixel, Pixel, Pixel, Pixel]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
# What is worked out may lie a little beyond what may be asked for.
FoundPoint = tuple[Real, Real]
FoundBox = tuple[Real, Real, Real, Real]
Text = Annotated[str, StringConstraints(min_length=1, max_length=limits.WORD_CHARS)]
Script = Annotated[str, StringConstraints(min_length=1, max_length=limits.TOKEN_CHARS)]
FileName = Annotated[
    str,
    # No folders, no control characters, and more than dots and spaces.
    StringConstraints(
        max_length=limits.FILE_NAME_CHARS,
        pattern=r"^[^/\\\x00-\x1f\x7f]*[^/\\\x00-\x1f\x7f. ][^/\\\x00-\x1f\x7f]*$",
    ),
]
Flag = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,63}$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=limits.DETAIL_CHARS)]
Refine = Literal["box", "glyph", "colour"]
SignWord = Annotated[
    str,
    StringConstraints(min_length=1, max_length=limits.SIGN_WORD_CHARS, pattern=r"\S"),
]
SignSide = Annotated[
    int,
    Field(ge=limits.MIN_SIGN_SIDE, le=limits.MAX_SIGN_SIDE, multiple_of=limits.SIDE_MULTIPLE),
]
DrivingSide = Literal["right", "left"]
Voxel = Annotated[float, Field(ge=0.05, le=1, allow_inf_nan=False)]
CalibrationText = Annotated[
    str, StringConstraints(min_length=1, max_length=limits.CALIBRATION_CHARS)
]


class MaskCode(Message):
    """A mask in COCO's compressed run lengths; ``size`` is height and width of the picture."""

    size: tuple[int, int]
    counts: str


class PromptSpec(Message):
    """What shall be cut out: a box around it, points on it or beside it, or both."""

    box: Box | None = Field(default=None, description="x0, y0, x1, y1")
    points: list[Point] = Field(default_factory=list, max_length=limits.MAX_POINTS)
    labels: list[Literal[0, 1]] = Field(
        default_factory=list,
        max_length=limits.MAX_POINTS,
        description="one per point: 1 on the object, 0 beside it",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.box is None and not self.points:
            raise ValueError("an empty prompt; give a box or points")
        if len(self.points) != len(self.labels):
            raise ValueError(
                f"{len(self.points)} points but {len(self.labels)} labels; give one per point"
            )
        check_box(self.box)
        return self


class SegmentPrompts(Message):
    """Prompts on one picture; the picture is looked at once and remembered."""

    model: ModelName
    image: Payload
    prompts: list[PromptSpec] = Field(min_length=1, max_length=limits.MAX_PROMPTS)
    multimask: bool = Field(default=False, description="always choose the best of three proposals")


class SegmentedMask(Message):
    """What one prompt cut out; ``box`` has exclusive ends and is all zero for an empty mask."""

    mask: MaskCode
    box: Box
    area: int = Field(ge=0, description="pixels")
    predicted_iou: Real
    stability: Share


class Segmented(Message):
    """One mask per prompt, in order; ``cached`` when nothing had to be looked at anew."""

    masks: list[SegmentedMask] = Field(min_length=1, max_length=limits.MAX_PROMPTS)
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    cached: bool


class WordSpec(Message):
    """A word that somebody has read: its text, and the polygon around it, clockwise from where
    reading starts.
    """

    text: Text
    polygon: list[Point] = Field(min_length=4, max_length=limits.MAX_POLYGON)
    script: Script | None = None
    ignore: bool = Field(default=False, description="unreadable: gets no masks")


def _together(words: list[WordSpec]) -> list[WordSpec]:
    """Refuse more corners or characters than a message holds beside a picture."""
    corners = sum(len(word.polygon) for word in words)
    characters = sum(len(word.text) + len(word.script or "") for word in words)
    for count, most, what in (
        (corners, limits.MAX_CORNERS, "corners of polygons"),
        (characters, limits.MAX_CHARACTERS, "characters"),
    ):
        if count > most:
            raise ValueError(f"{count:,} {what} in all, at most {most:,}; send fewer words at once")
    return words


Words = Annotated[list[WordSpec], Field(max_length=limits.MAX_WORDS), AfterValidator(_together)]


class AnnotateText(Message):
    """Masks for every character of the words; without words, of those that a reader finds."""

    model: ModelName
    image: Payload
    name: FileName | None = Field(default=None, description="of the file, for exports")
    words: Words | None = None
    refine: Refine = "colour"
    min_score: Share = Field(default=0.3, description="characters below it are refused")


class AnnotatedCharacter(Message):
    """One character; ``refused`` tells why its mask should not train anything."""

    char: str = Field(min_length=1, max_length=limits.WORD_CHARS)
    index: int = Field(ge=0, description="place in the text, spaces counted")
    box: FoundBox
    quad: list[FoundPoint] = Field(description="the same box along the reading direction")
    mask: MaskCode
    score: Share
    flags: list[Flag] = Field(default_factory=list)
    refused: Reason | None = None


class AnnotatedWord(Message):
    """One word with its characters, in the order of the request."""

    text: Text
    polygon: list[Point]
    script: Script | None = None
    ignore: bool = False
    source: Literal["given", "ocr"]
    confidence: Share = Field(description="of the reader; 1 where the text was given")
    mask: MaskCode
    score: Share
    flags: list[Flag] = Field(default_factory=list)
    refused: Reason | None = None
    characters: list[AnnotatedCharacter] = Field(default_factory=list)


class TextLabels(Message):
    """All words of a picture, as the blob ``labels`` of a finished job holds them in JSON."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    words: list[AnnotatedWord]


class AnnotationProvenance(Message):
    """What made labels; enough to make them again."""

    model: ModelName
    segmenter: str = Field(max_length=limits.MODEL_NAME_CHARS)
    segmenter_sha256: Sha256
    weights_sha256: Sha256 | None = Field(default=None, description="of the shapes of cars")
    versions: dict[str, str] = Field(default_factory=dict)


class TextSummary(Message):
    """How it went; the reason of a refusal is its text up to the first colon."""

    words: int = Field(ge=0)
    labelled: int = Field(ge=0)
    ignored: int = Field(ge=0)
    characters: int = Field(ge=0, description="that have a mask and were not refused")
    flagged: dict[str, int] = Field(default_factory=dict)
    refused: dict[str, int] = Field(default_factory=dict)


class TextAnnotated(Message):
    """Labelled words. ``labels`` is the JSON of TextLabels, ``overlay`` a PNG to look at."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    name: FileName | None = None
    image: BlobRef = Field(description="the picture of the request, for exports")
    labels: BlobRef
    overlay: BlobRef
    transcription: Literal["given", "ocr"] = Field(description="who read the words")
    summary: TextSummary
    provenance: AnnotationProvenance


class CarPrompt(Message):
    """Where a car is: the box around it, or one point on it."""

    box: Box | None = Field(default=None, description="left, top, right, bottom")
    point: Point | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.box is None) == (self.point is None):
            raise ValueError("a car is prompted by a box or by a point on it; give one of them")
        check_box(self.box)
        return self


class AnnotateCars(Message):
    """Boxes and shapes in space for the cars of one frame; without points from the picture alone,
    which is flagged.
    """

    model: ModelName
    image: Payload
    name: FileName | None = Field(default=None, description="of the frame, for exports")
    calibration: CalibrationText = Field(
        description="text of a KITTI calib file: P2, R0_rect and Tr_velo_to_cam"
    )
    points: Payload | None = Field(
        default=None, description="LiDAR returns x, y, z, reflectance as little-endian float32"
    )
    prompts: list[CarPrompt] = Field(min_length=1, max_length=limits.MAX_CARS)
    driving_side: DrivingSide = "right"
    meshes: bool = Field(default=False, description="also the fitted surfaces, as one GLB")
    occupancy: Voxel | None = Field(
        default=None, description="also the filled voxels of this size, in metres, as PLY points"
    )


class AnnotatedCar(Message):
    """One car as a KITTI label has it: metres and radians in the rectified camera frame."""

    kind: str = Field(min_length=1, max_length=limits.TOKEN_CHARS)
    truncated: Share
    occluded: int = Field(ge=0, le=3)
    alpha: Real
    box: Box = Field(description="left, top, right, bottom")
    size: tuple[Real, Real, Real] = Field(description="height, width, length")
    location: tuple[Real, Real, Real] = Field(description="centre of the bottom face")
    rotation_y: Real
    score: Share
    points: int = Field(ge=0, description="LiDAR returns on it")
    flags: list[Flag] = Field(default_factory=list)
    energies: dict[str, Real] = Field(default_factory=dict)
    pose: tuple[Real, Real, Real, Real] = Field(
        description="x, y, z and rotation_y of the shape's own frame"
    )
    code: list[Real] = Field(
        max_length=limits.SHAPE_CODE, description="the shape, in components of the prior"
    )
    corners: list[FoundPoint] = Field(
        max_length=8, description="the box in the picture; empty where a corner is behind it"
    )


class CarOutcome(Message):
    """What became of one prompt: a car, or why there is none; the mask in both cases."""

    index: int = Field(ge=0, description="place of the prompt")
    mask: MaskCode
    car: AnnotatedCar | None = None
    refused: Reason | None = None


class CarLabels(Message):
    """All prompts of a picture, as the blob ``labels`` of a finished job holds them in JSON."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    calibration: CalibrationText = Field(description="that of the request: it leads to the LiDAR")
    objects: list[CarOutcome]


class CarsAnnotated(Message):
    """Labelled cars. ``labels`` is the JSON of CarLabels, ``kitti`` the text of a result file with
    scores, ``overlay`` and ``birds_eye`` are PNGs to look at, ``meshes`` is a GLB in metres,
    ``occupancy`` a PLY of points in the LiDAR frame.
    """

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    name: FileName | None = None
    image: BlobRef = Field(description="the picture of the request, for exports")
    labels: BlobRef
    kitti: str = Field(max_length=limits.KITTI_CHARS)
    overlay: BlobRef
    birds_eye: BlobRef
    meshes: BlobRef | None = None
    occupancy: BlobRef | None = None
    cars: int = Field(ge=0)
    refused: dict[str, int] = Field(default_factory=dict, description="prompts by reason")
    flagged: dict[str, int] = Field(default_factory=dict)
    provenance: AnnotationProvenance


class DrawSigns(Message):
    """Pictures with a sign in each, drawn and then labelled.

    A model of the diffusion service draws ``prompt``; the words are set by a font on a board and
    put into what it drew, one line each. Picture i has seed ``seed`` + i.
    """

    model: ModelName = Field(description="labels the words")
    generator: ModelName = Field(description="draws what is behind them")
    prompt: Prompt
    words: list[SignWord] = Field(min_length=1, max_length=limits.MAX_SIGN_WORDS)
    pictures: int = Field(default=1, ge=1, le=limits.MAX_SIGNS)
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT - limits.MAX_SIGNS)
    width: SignSide = Field(default=512, description="of the finished picture")
    height: SignSide = 512
    drawn_width: Side = Field(description="of what the generator draws; enlarged to the picture")
    drawn_height: Side
    refine: Refine = "colour"
    min_score: Share = Field(default=0.3, description="characters below it are refused")


class DrawnSign(Message):
    """One picture. ``labels`` is the JSON of TextLabels, ``truth`` a PNG whose value k is the k-th
    character of the picture, spaces not counted, as it was set, by which ``agreement`` is measured.
    """

    name: FileName
    seed: int = Field(ge=0, lt=limits.SEED_LIMIT)
    drawn_by: JobId = Field(description="the job of the diffusion service that drew it")
    image: BlobRef
    labels: BlobRef
    overlay: BlobRef
    truth: BlobRef
    agreement: Share = Field(description="foreground IoU of the labels with the truth")
    summary: TextSummary


class SignsDrawn(Message):
    """Labelled signs. ``text`` tells where the words come from: the model drew none of them."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    words: list[SignWord]
    text: Literal["composed"] = Field(
        default="composed", description="set by a font and put into the picture, not drawn"
    )
    pictures: list[DrawnSign] = Field(min_length=1, max_length=limits.MAX_SIGNS)
    agreement: Share = Field(description="mean over the pictures")
    generator: Provenance
    provenance: AnnotationProvenance


def check_box(box: Box | None) -> None:
    """``ValueError`` for a box without area."""
    if box is not None and (box[2] <= box[0] or box[3] <= box[1]):
        raise ValueError(f"the box {list(box)} has no area; expected x0 < x1 and y0 < y1")
