"""Annotations at the door: what can be known to be wrong before a service looks is refused here.

Every sentence names the field of the request, list indices included.
"""

import asyncio
from collections.abc import Sequence

from gesso_contracts import AnnotateCars, AnnotateText, CarPrompt, PromptSpec, WordSpec, limits
from gesso_contracts.annotations import Box, Point
from gesso_contracts.base import Message
from gesso_contracts.blobs import Inline, Payload
from gesso_core.annotate.char_sam.words import WordAnnotation, check_word
from gesso_core.annotate.kitti.calibration import parse_calibration
from gesso_core.annotate.kitti.dataset import parse_points
from gesso_core.errors import InvalidRequest

from gesso_services.gateway.uploads import Intake

Size = tuple[int, int]  # height, width
POINTS_TYPE = "application/octet-stream"


def check_prompts(prompts: Sequence[PromptSpec], size: Size, field: str) -> None:
    """InvalidRequest for a box that misses the picture, or a point outside of it."""
    for index, prompt in enumerate(prompts):
        _check_place(prompt.box, prompt.points, size, f"{field}.{index}", "points")


def check_car_prompts(prompts: Sequence[CarPrompt], size: Size, field: str) -> None:
    """The same for cars."""
    for index, prompt in enumerate(prompts):
        points = [] if prompt.point is None else [prompt.point]
        _check_place(prompt.box, points, size, f"{field}.{index}", "point")


def check_words(words: Sequence[WordSpec] | None, size: Size, field: str) -> None:
    """InvalidRequest for a polygon that is beside the picture or encloses nothing, and for a word
    without text.
    """
    for index, word in enumerate(words or ()):
        given = WordAnnotation(text=word.text, polygon=tuple(word.polygon), ignore=word.ignore)
        check_word(given, size, name=f"{field}.{index}")


def read_calibration(data: bytes, field: str = "calibration") -> str:
    """The text of a calib file; InvalidRequest says which line is missing or wrong."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"these {len(data):,} bytes are no text; send the calib file of the frame, with the "
            "lines P2, R0_rect and Tr_velo_to_cam",
            field=field,
        ) from error
    if not 0 < len(text) <= limits.CALIBRATION_CHARS:
        raise InvalidRequest(
            f"this file has {len(text):,} characters, a calib file has 1 to "
            f"{limits.CALIBRATION_CHARS:,}; send the one of the frame",
            field=field,
        )
    check_calibration(text, field)
    return text


def check_calibration(text: str, field: str) -> None:
    """InvalidRequest for a calibration that is no such file."""
    try:
        parse_calibration(text)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field=field) from error


async def take_points(data: bytes, intake: Intake, field: str = "points") -> Payload:
    """A LiDAR scan; InvalidRequest for bytes that are no whole number of points."""
    try:
        await asyncio.to_thread(parse_points, data)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field=field) from error
    return await intake.pack(data, POINTS_TYPE)


async def looked_at(wanted: Message, intake: Intake, field: str) -> Message:
    """A message that somebody wrote by hand: the same checks, and what is large as blobs."""
    if isinstance(wanted, AnnotateText):
        size = await _size(wanted.image, intake, f"{field}.image")
        if size is not None:
            check_words(wanted.words, size, f"{field}.words")
        return wanted.model_copy(
            update={"image": await intake.again(wanted.image, f"{field}.image")}
        )
    if isinstance(wanted, AnnotateCars):
        size = await _size(wanted.image, intake, f"{field}.image")
        if size is not None:
            check_car_prompts(wanted.prompts, size, f"{field}.prompts")
        check_calibration(wanted.calibration, f"{field}.calibration")
        points = wanted.points
        if isinstance(points, Inline):
            points = await take_points(points.data, intake, f"{field}.points")
        image = await intake.again(wanted.image, f"{field}.image")
        return wanted.model_copy(update={"image": image, "points": points})
    return wanted


async def _size(image: Payload, intake: Intake, field: str) -> Size | None:
    """None for a picture that lies with the broker already: the service looks at it."""
    return await intake.measure(image.data, field) if isinstance(image, Inline) else None


def _check_place(
    box: Box | None, points: Sequence[Point], size: Size, field: str, name: str
) -> None:
    height, width = size
    if box is not None:
        x0, y0, x1, y1 = box
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise InvalidRequest(
                f"the box {list(box)} lies outside the {width}x{height} picture; boxes are "
                "[x0, y0, x1, y1] in pixels of the upright picture",
                field=f"{field}.box",
            )
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise InvalidRequest(
                f"the point [{x:g}, {y:g}] lies outside the {width}x{height} picture; points are "
                "[x, y] in pixels of the upright picture",
                field=f"{field}.{name}",
            )
