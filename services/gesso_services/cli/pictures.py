"""``gesso generate``, ``vary`` and ``reconstruct``: pictures from the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer
from gesso_core.errors import InvalidRequest

from gesso_services.cli.common import Key, Local, Url, err, one_sentence, out, progress_bars, server
from gesso_services.cli.output import Lines, Output, format_of, write_pictures
from gesso_services.client import DEFAULT_URL

Seed = Annotated[int | None, typer.Option(min=0, help="The same seed, the same picture.")]
Guidance = Annotated[float | None, typer.Option(min=0, max=30)]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw from so many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Draw from the likeliest part.")]
Model = Annotated[str | None, typer.Option(help="See `gesso models list`.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=10, help="Pictures.")]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT or auto.")]


@one_sentence
def generate(
    *,
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Output = Path("gesso.png"),
    model: Model = None,
    n: Count = 1,
    size: Size = "auto",
    seed: Seed = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100)] = None,
    guidance: Guidance = None,
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
    top_k: TopK = None,
    top_p: TopP = None,
    best_of: Annotated[
        int | None, typer.Option(min=1, max=16, help="Draw so many, keep the best.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Who chooses, with --best-of.")] = None,
    local: Local = False,
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
        "top_k": top_k,
        "top_p": top_p,
        "best_of": best_of,
        "judge": judge,
        "output_format": format_of(output),
    }
    with progress_bars() as bars:
        lines = Lines(bars, max(n, best_of or 0))
        if local:
            from gesso_services.cli.local import generate_here

            pictures = generate_here(prompt, options, lines.show, lora_folder)
        else:
            with server(url, key) as gesso:
                pictures = gesso.generate(prompt, on_progress=lines.show, **options)
        lines.finish()
    write_pictures(pictures, output)


@one_sentence
def vary(
    *,
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.", dir_okay=False)],
    prompt: Annotated[str, typer.Argument(help="What the new picture shall show.")],
    keep: Annotated[
        int | None, typer.Option(min=0, help="Scales or rows that stay; half, or 0 to look only.")
    ] = None,
    output: Output = Path("variation.png"),
    model: Model = None,
    n: Count = 1,
    size: Size = "auto",
    seed: Seed = None,
    guidance: Guidance = None,
    top_k: TopK = None,
    top_p: TopP = None,
    local: Local = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Paint a picture that begins like another one."""
    options: dict[str, Any] = {
        "model": model,
        "n": n,
        "size": size,
        "seed": seed,
        "keep": keep,
        "guidance_scale": guidance,
        "top_k": top_k,
        "top_p": top_p,
        "output_format": format_of(output),
    }
    data = image.read_bytes()
    with progress_bars() as bars:
        lines = Lines(bars, n)
        if local:
            from gesso_services.cli.local import vary_here

            pictures = vary_here(data, prompt, options, lines.show)
        else:
            with server(url, key) as gesso:
                pictures = gesso.vary(data, prompt, on_progress=lines.show, **options)
        lines.finish()
    write_pictures(pictures, output)


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


def lora_of(text: str) -> dict[str, Any]:
    """Name and strength from ``NAME[:STRENGTH]``; the strength is 1 where none is given."""
    name, colon, strength = text.partition(":")
    try:
        return {"name": name, "strength": float(strength) if colon else 1.0}
    except ValueError as error:
        raise InvalidRequest(
            f"--lora {text!r}: {strength!r} is not a number; write it like ink:0.8", field="loras"
        ) from error
