"""``gesso generate`` and ``gesso reconstruct``: pictures from the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer
from gesso_core.errors import InvalidRequest
from rich.progress import Progress as Bars
from rich.progress import TaskID

from gesso_services.cli.common import (
    Key,
    Url,
    err,
    one_sentence,
    out,
    progress_bars,
    remark,
    server,
)
from gesso_services.client import DEFAULT_URL, Picture, Progress

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
Output = Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")]


@one_sentence
def generate(
    *,
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Output = Path("gesso.png"),
    model: Annotated[str | None, typer.Option(help="See `gesso models list`.")] = None,
    n: Annotated[int, typer.Option("--count", "-n", min=1, max=10, help="Pictures.")] = 1,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT or auto.")] = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed, the same picture.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100)] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=30)] = None,
    negative: Annotated[str, typer.Option(help="What should not be in it.")] = "",
    sampler: Annotated[str | None, typer.Option(help="flow-dpm-solver, flow-euler or scm.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:STRENGTH]", help="A LoRA of the server; may be repeated."),
    ] = None,
    lora_folder: Annotated[
        Path | None,
        typer.Option(
            help="Where LoRA files lie, with --local; else those that ship.",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="In this process, without a server.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Paint a picture and write it to a file."""
    if lora_folder is not None and not local:
        raise InvalidRequest(
            f"--lora-folder {lora_folder} is for --local; a server has a folder of its own: put "
            "the file there, or paint with --local"
        )
    options: dict[str, Any] = {
        "model": model,
        "n": n,
        "size": size,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative,
        "sampler": sampler,
        "loras": [lora_of(text) for text in lora or ()] or None,
        "output_format": format_of(output),
    }
    with progress_bars() as bars:
        lines = _Lines(bars, n)
        if local:
            from gesso_services.cli.local import generate_here

            pictures = generate_here(prompt, options, lines.show, lora_folder)
        else:
            with server(url, key) as gesso:
                pictures = gesso.generate(prompt, on_progress=lines.show, **options)
        lines.finish()
    _write(pictures, output)


@one_sentence
def reconstruct(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.", dir_okay=False)],
    output: Output = Path("reconstruction.png"),
    model: Annotated[
        str | None, typer.Option(help="An autoencoder; see `gesso models list`.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Send a picture through the autoencoder and back, and say how close it stayed."""
    picture_format = format_of(output)
    data = image.read_bytes()
    with err.status(f"encoding and decoding {image.name}"), server(url, key) as gesso:
        made = gesso.reconstruct(data, model=model, output_format=picture_format)
    output.write_bytes(made.data)
    out.print(f"{output}  PSNR {made.psnr_db:.2f} dB  SSIM {made.ssim:.4f}", highlight=False)


def format_of(path: Path) -> str:
    """The output format that the name of the file asks for; its folder must exist."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(
            f"{path} has the ending {path.suffix or '(none)'!r}; use one of {', '.join(FORMATS)}"
        )
    if not path.parent.is_dir():
        raise InvalidRequest(f"the folder {path.parent} does not exist; create it first")
    return FORMATS[path.suffix.lower()]


def lora_of(text: str) -> dict[str, Any]:
    """Name and strength from ``NAME[:STRENGTH]``; the strength is 1 where none is given."""
    name, colon, strength = text.partition(":")
    try:
        return {"name": name, "strength": float(strength) if colon else 1.0}
    except ValueError as error:
        raise InvalidRequest(
            f"--lora {text!r}: {strength!r} is not a number; write it like ink:0.8", field="loras"
        ) from error


class _Lines:
    """One progress line per picture."""

    def __init__(self, bars: Bars, count: int) -> None:
        self.bars = bars
        self.tasks: list[TaskID] = [
            bars.add_task(
                f"picture {index + 1}" if count > 1 else "painting", total=1.0, note="waiting"
            )
            for index in range(count)
        ]

    def show(self, at: Progress) -> None:
        note = f"step {at.step}/{at.total_steps}" if at.total_steps else "waiting"
        self.bars.update(self.tasks[at.index], completed=at.progress, note=note)

    def finish(self) -> None:
        for task in self.tasks:
            self.bars.update(task, completed=1.0, note="done")


def _write(pictures: list[Picture], output: Path) -> None:
    for index, picture in enumerate(pictures):
        stem = output.stem if len(pictures) == 1 else f"{output.stem}-{index + 1}"
        path = picture.save(output.with_name(stem + output.suffix))
        out.print(f"{path}  seed {picture.seed}", highlight=False)
    made = pictures[0].metadata
    if made.get("in_domain") is False:
        ideas = "; ".join(made.get("suggestions", []))
        remark(
            f"{made['model']} has not learned all of that prompt; it knows, for example: {ideas}"
        )
