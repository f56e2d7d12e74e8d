"""Files that commands write, and the progress lines on the way to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from gesso_core.errors import InvalidRequest
from rich.progress import Progress as Bars
from rich.progress import TaskID

from gesso_services.cli.common import out, remark
from gesso_services.client import Picture, Progress

PICTURES: Final = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
VIDEOS: Final = {".mp4": "mp4", ".webp": "webp", ".gif": "gif"}
Output = Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")]
VideoOutput = Annotated[Path, typer.Option("--output", "-o", help="A .mp4, .webp or .gif file.")]


def format_of(path: Path, formats: Mapping[str, str] = PICTURES) -> str:
    """The output format that the name of the file asks for; its folder must exist."""
    if path.suffix.lower() not in formats:
        raise InvalidRequest(
            f"{path} has the ending {path.suffix or '(none)'!r}; use one of {', '.join(formats)}"
        )
    if not path.parent.is_dir():
        raise InvalidRequest(f"the folder {path.parent} does not exist; create it first")
    return formats[path.suffix.lower()]


class Lines:
    """One progress line per picture."""

    def __init__(self, bars: Bars, count: int, what: str = "painting") -> None:
        self.bars = bars
        self.tasks: list[TaskID] = [
            bars.add_task(f"picture {index + 1}" if count > 1 else what, total=1.0, note="waiting")
            for index in range(count)
        ]

    def show(self, at: Progress) -> None:
        """Move the line of one picture."""
        note = f"step {at.step}/{at.total_steps}" if at.total_steps else "waiting"
        self.bars.update(self.tasks[at.index], completed=at.progress, note=note)

    def finish(self) -> None:
        """All are done."""
        for task in self.tasks:
            self.bars.update(task, completed=1.0, note="done")


def write_pictures(pictures: Sequence[Picture], output: Path) -> None:
    """Write the files, numbered where there are several, and say how to make them again."""
    for index, picture in enumerate(pictures):
        stem = output.stem if len(pictures) == 1 else f"{output.stem}-{index + 1}"
        path = picture.save(output.with_name(stem + output.suffix))
        score = "" if picture.score is None else f"  score {picture.score:.3f}"
        out.print(f"{path}  seed {picture.seed}{score}", highlight=False, soft_wrap=True)
    made = pictures[0].metadata
    if made.get("in_domain") is False:
        ideas = "; ".join(made.get("suggestions", []))
        remark(
            f"{made['model']} has not learned all of that prompt; it knows, for example: {ideas}"
        )
