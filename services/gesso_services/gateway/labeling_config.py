"""The labelling interface of a Label Studio project, as far as predictions depend on it."""

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from gesso_core.annotate.char_sam.label_studio import Shape
from gesso_core.errors import InvalidRequest

EXAMPLE: Final = (
    '<View><Image name="image" value="$image"/><BrushLabels name="label" toName="image">'
    '<Label value="word"/><Label value="character"/></BrushLabels></View>'
)
_CONTROLS: Final[dict[str, Shape]] = {"BrushLabels": "brush", "PolygonLabels": "polygon"}


@dataclass(frozen=True)
class LabelingConfig:
    """Where the picture is, and which control takes the masks.

    Attributes:
        key: the field of a task's data that holds the picture.
        to_name, from_name: names of the picture and of the control.
        shape: what the control takes.
        labels: what it knows.
    """

    key: str
    to_name: str
    from_name: str
    shape: Shape
    labels: frozenset[str]


def read_config(text: str, field: str) -> LabelingConfig:
    """The first picture, and the first control of brushes or polygons on it.

    InvalidRequest, with an example, for what is no such interface.
    """
    root = _parse(text, field)
    image = next((tag for tag in root.iter("Image") if tag.get("name")), None)
    key = "" if image is None else image.get("value", "")
    if image is None or not key.startswith("$"):
        raise InvalidRequest(
            f"the labelling interface has no <Image> with a name and a $value; expected {EXAMPLE}",
            field=field,
        )
    name = image.get("name", "")
    for kind, shape in _CONTROLS.items():
        for control in root.iter(kind):
            if control.get("toName") == name and control.get("name"):
                return LabelingConfig(
                    key=key[1:],
                    to_name=name,
                    from_name=control.get("name", ""),
                    shape=shape,
                    labels=frozenset(label.get("value", "") for label in control.iter("Label")),
                )
    raise InvalidRequest(
        f"nothing in the labelling interface takes masks of {name!r}; expected BrushLabels or "
        f"PolygonLabels, like {EXAMPLE}",
        field=field,
    )


def _parse(text: str, field: str) -> ElementTree.Element:
    if "<!" in text.replace("<!--", ""):
        raise InvalidRequest(
            "the labelling interface declares a document type; leave that out", field=field
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidRequest(
            f"the labelling interface is no XML ({error}); expected {EXAMPLE}", field=field
        ) from error
