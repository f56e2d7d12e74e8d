"""``gesso annotate``: words to the masks of their characters, cars to boxes in space, and signs
that are drawn to be labelled.
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from gesso_core.errors import ConfigError, InvalidRequest
from rich.progress import Progress

from gesso_services.cli.annotated_folder import (
    MANIFEST,
    Annotates,
    CarFormat,
    Counts,
    Folder,
    Item,
    SetFormat,
)
from gesso_services.cli.common import (
    Key,
    Local,
    Url,
    complain,
    one_sentence,
    out,
    progress_bars,
    server,
)
from gesso_services.client import DEFAULT_URL
from gesso_services.client_wire import Json
from gesso_services.client_wire import Progress as Step

app = typer.Typer(no_args_is_help=True, help="Label text and cars in pictures and folders.")
Out = Annotated[Path, typer.Option("--out", help="Where everything is written.", file_okay=False)]
Window = Annotated[int, typer.Option(min=1, max=64, help="Jobs under way at once.")]


@app.command()
@one_sentence
def text(
    *,
    path: Annotated[Path, typer.Argument(help="A picture, or a folder of them.", exists=True)],
    words: Annotated[
        Path | None,
        typer.Option(
            help="words.json, a COCO-Text file or a folder of ICDAR files; else a reader looks.",
            exists=True,
        ),
    ] = None,
    file_format: Annotated[SetFormat, typer.Option("--format", help="Of the data set.")] = "coco",
    output: Out = Path("annotated-text"),
    refine: Annotated[
        str | None, typer.Option(help="box, glyph or colour: how far masks are refined.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Characters below it are refused.")
    ] = None,
    window: Window = 8,
    local: Local = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Masks for every character. The same command again goes on where it was stopped."""
    if refine not in (None, "box", "glyph", "colour"):
        raise InvalidRequest(f"--refine {refine!r}; use box, glyph or colour", field="refine")
    from gesso_services.cli.annotated_sets import write_set
    from gesso_services.cli.annotation_items import ServerText, text_items, words_from

    options: Json = {"refine": refine, "min_score": min_score}
    items = text_items(path, words_from(words), apart_from=output)
    if local:
        from gesso_services.cli.local_annotation import LocalText

        counts = _run(output, LocalText(options), {"text": options}, items, 1)
    else:
        with server(url, key) as gesso:
            counts = _run(output, ServerText(gesso, options), {"text": options}, items, window)
    root = path.parent if path.is_file() else path
    _end(counts, output, write_set(output, root, file_format))


@app.command()
@one_sentence
def cars(
    *,
    path: Annotated[
        Path, typer.Argument(help="A KITTI folder: image_2, calib, velodyne.", exists=True)
    ],
    output: Out = Path("annotated-cars"),
    frames: Annotated[
        str | None, typer.Option(help="Only these, like 000001,000007.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON like {"000001": [{"box": [x0, y0, x1, y1]}]}; else the boxes of label_2.',
            exists=True,
        ),
    ] = None,
    file_format: Annotated[
        CarFormat, typer.Option("--format", help="Of the data set, beside label_2.")
    ] = "kitti",
    driving_side: Annotated[str, typer.Option(help="right or left.")] = "right",
    meshes: Annotated[bool, typer.Option("--meshes", help="Also the shapes, as GLB.")] = False,
    occupancy: Annotated[
        float | None,
        typer.Option(min=0.05, max=1, help="Also the voxels they fill, so many metres, as PLY."),
    ] = None,
    window: Window = 4,
    local: Local = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Boxes in space and shapes of cars. The same command again goes on where it was stopped."""
    if driving_side not in ("right", "left"):
        raise InvalidRequest(f"--driving-side {driving_side!r}; use right or left")
    from gesso_services.cli.annotated_sets import write_car_set
    from gesso_services.cli.annotation_items import ServerCars, car_items

    options: Json = {"driving_side": driving_side, "meshes": meshes, "occupancy": occupancy}
    wanted = [name.strip() for name in (frames or "").split(",") if name.strip()]
    items = car_items(path, wanted, prompts)
    if local:
        from gesso_services.cli.local_annotation import LocalCars

        counts = _run(output, LocalCars(options), {"cars": options}, items, 1)
    else:
        with server(url, key) as gesso:
            counts = _run(output, ServerCars(gesso, options), {"cars": options}, items, window)
    _end(counts, output, write_car_set(output, file_format))


@app.command()
@one_sentence
def draw(
    *,
    prompt: Annotated[
        str, typer.Argument(help="What to draw behind the sign; it may quote what the sign says.")
    ],
    words: Annotated[
        list[str] | None, typer.Option(help="A line of the sign; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("--count", "-n", "--n", min=1, max=16, help="Pictures.")] = 1,
    output: Out = Path("drawn-signs"),
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of a picture.")] = "512x512",
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed, the same signs.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="Who draws; see `gesso models list`.")
    ] = None,
    refine: Annotated[str | None, typer.Option(help="box, glyph or colour.")] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Characters below it are refused.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Draw pictures, put a sign into each, label its characters: a COCO data set with its truth."""
    from gesso_services.cli.annotated_sets import COCO
    from gesso_services.cli.drawn_signs import words_of, write_signs

    options: Json = {"n": n, "size": size, "seed": seed, "generator": generator}
    options |= {"refine": refine, "min_score": min_score}
    with server(url, key) as gesso:
        with progress_bars() as bars:
            line = bars.add_task("drawing", total=1, note="")

            def show(step: Step) -> None:
                bars.update(line, completed=step.progress)

            made = gesso.draw_signs(
                prompt, words_of(prompt, words or []), on_progress=show, **options
            )
        for path, sign in zip(write_signs(gesso, made, output), made["pictures"], strict=True):
            told = f"{path}  seed {sign['seed']}  agreement {sign['agreement']:.3f}"
            out.print(told, highlight=False, soft_wrap=True)
    out.print(
        f"{output / COCO}  mean agreement {made['agreement']:.3f} with the words as they were set",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    "eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
@one_sentence
def evaluate(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="text or cars.")],
) -> None:
    """Print the tables of the method; what follows goes to its evaluation, like --help."""
    places = {"text": "char_sam", "cars": "slf"}
    if what not in places:
        raise ConfigError(f"there is nothing to evaluate for {what!r}; use text or cars")
    module = import_module(f"gesso_core.annotate.{places[what]}.evaluate")
    raise typer.Exit(module.main(context.args))


def _run(
    output: Path, annotates: Annotates, options: Json, items: Iterable[Item], window: int
) -> Counts:
    with progress_bars() as bars:
        shown = _Shown(bars)
        folder = Folder(output, annotates, options, window=window, tell=shown.tell)
        return folder.run(items)


class _Shown:
    """One bar that counts, and a sentence for each failure."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.line = bars.add_task("annotating", total=None, note="")
        self.done = 0

    def tell(self, line: Json) -> None:
        if line["status"] == "failed":
            complain(f"{line['name']}: {line['error']}")
            return
        self.done += 1
        self.bars.update(self.line, completed=self.done, note=f"{self.done} done, {line['name']}")


def _end(counts: Counts, output: Path, data_set: Path) -> None:
    out.print(
        f"{counts.done} done, {counts.skipped} were done before, {counts.failed} failed; "
        f"{data_set} and {output / MANIFEST} have it all",
        highlight=False,
        soft_wrap=True,
    )
    if counts.failed:
        raise typer.Exit(1)
