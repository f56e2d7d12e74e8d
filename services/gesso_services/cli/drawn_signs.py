"""What ``gesso annotate draw`` is asked for, and what it writes."""

import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Final

from gesso_core.errors import InvalidRequest

from gesso_services.cli.annotated_folder import write
from gesso_services.cli.annotated_sets import COCO
from gesso_services.client import Gesso
from gesso_services.client_wire import Json

_QUOTED: Final = re.compile(r"""["“„«]([^"“”„«»]+)["“”»]""")


def words_of(prompt: str, given: list[str]) -> list[str]:
    """The words of the sign: those given, else those that the prompt has in quotes."""
    words = given or [text.strip() for text in _QUOTED.findall(prompt) if text.strip()]
    if not words:
        raise InvalidRequest(
            "what shall the sign say? Give --words, once per line, or quote it in the prompt: "
            "'a sign that says \"OPEN\"'",
            field="words",
        )
    return words


def write_signs(gesso: Gesso, made: Json, output: Path) -> list[Path]:
    """Pictures, overlays, masks of the truth and one COCO file; the paths of the pictures, in their
    order.
    """
    with zipfile.ZipFile(BytesIO(gesso.export(made["id"], "coco"))) as packed:
        write(output / COCO, packed.read("annotations.json"))
        paths = []
        for sign in made["pictures"]:
            name = Path(sign["name"]).name
            paths.append(output / "images" / name)
            write(paths[-1], packed.read(f"images/{sign['name']}"))
            for folder, part in (("overlays", "overlay"), ("truth", "truth")):
                data = gesso.drawing(made["id"], part, picture=sign["index"])
                write(output / folder / name, data)
    return paths
