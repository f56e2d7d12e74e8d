"""The labelling interface of a Label Studio project, as far as predictions depend on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from gesso_core.annotate.char_sam.label_studio import Shape
from gesso_core.errors import InvalidRequest

EXAMPLE: Final = (
    '<View><Image name="image" value="$image"/><BrushLabels name="label" toName="image">'
    '<Label value="word"/><Label value="character"/></BrushLabels></View>'
)
TEXT_LABELS: Final = frozenset({"word", "character"})
_CONTROLS: Final[dict[str, Shape]] = {"brushlabels": "brush", "polygonlabels": "polygon"}


@dataclass(frozen=True)
class Control:
    """A tag that takes masks: its name, what it takes, and the labels it knows."""

    name: str
    shape: Shape
    labels: frozenset[str]


@dataclass(frozen=True)
class LabelingConfig:
    """Where the picture is, and which controls take masks of it.

    Attributes:
        key: the field of a task's data that holds the picture.
        to_name: the name of the picture.
        controls: brushes before polygons, at least one.
    """

    key: str
    to_name: str
    controls: tuple[Control, ...]

    @property
    def for_text(self) -> Control | None:
        """The first control that knows words or characters."""
        return next((one for one in self.controls if one.labels & TEXT_LABELS), None)

    def brush_for(self, label: str | None) -> Control | None:
        """The first brush that knows ``label``, else the first brush."""
        brushes = [one for one in self.controls if one.shape == "brush"]
        return next((one for one in brushes if label in one.labels), next(iter(brushes), None))


def read_config(text: str, field: str) -> LabelingConfig:
    """The first picture that brushes or polygons belong to, and those.

    InvalidRequest, with an example, for what is no such interface.
    """
    root = _parse(text, field)
    images = [
        (image.get("name", ""), image.get("value", "")[1:])
        for image in _tags(root, "image")
        if image.get("name") and image.get("value", "").startswith("$")
    ]
    if not images:
        raise InvalidRequest(
            f"the labelling interface has no <Image> with a name and a $value; expected {EXAMPLE}",
            field=field,
        )
    for name, key in images:
        if controls := tuple(_controls(root, name)):
            return LabelingConfig(key=key, to_name=name, controls=controls)
    raise InvalidRequest(
        f"nothing in the labelling interface takes masks of {images[0][0]!r}; expected BrushLabels "
        f"or PolygonLabels, like {EXAMPLE}",
        field=field,
    )


def _controls(root: ElementTree.Element, image: str) -> Iterator[Control]:
    for kind, shape in _CONTROLS.items():
        for tag in _tags(root, kind):
            if tag.get("name") and image in tag.get("toName", "").split(","):
                # A label is kept under its alias, where it has one.
                labels = {one.get("alias") or one.get("value") or "" for one in _tags(tag, "label")}
                yield Control(tag.get("name", ""), shape, frozenset(labels))


def _tags(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Label Studio does not mind how the names of tags are capitalized."""
    return (tag for tag in root.iter() if tag.tag.lower() == name)


def _parse(text: str, field: str) -> ElementTree.Element:
    if "<!DOCTYPE" in text:  # the only place where entities can be declared
        raise InvalidRequest(
            "the labelling interface declares a document type; leave that out", field=field
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidRequest(
            f"the labelling interface is no XML ({error}); expected {EXAMPLE}", field=field
        ) from error
