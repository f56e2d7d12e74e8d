"""``gesso video``: a short video from the command line."""

from pathlib import Path
from typing import Annotated

import typer

from gesso_services.cli.common import Key, Url, one_sentence, out, progress_bars, server
from gesso_services.cli.output import VIDEOS, Lines, VideoOutput, format_of
from gesso_services.cli.pictures import Guidance, Model, Seed, TopK, TopP
from gesso_services.client import DEFAULT_URL


@one_sentence
def video(
    *,
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: VideoOutput = Path("gesso.mp4"),
    model: Model = None,
    seed: Seed = None,
    fps: Annotated[int | None, typer.Option(min=1, max=60, help="Frames per second.")] = None,
    guidance: Guidance = None,
    top_k: TopK = None,
    top_p: TopP = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Make a short video and write it to a file."""
    video_format = format_of(output, VIDEOS)
    with progress_bars() as bars, server(url, key) as gesso:
        lines = Lines(bars, 1, "filming")
        made = gesso.video(
            prompt,
            on_progress=lines.show,
            model=model,
            seed=seed,
            fps=fps,
            guidance_scale=guidance,
            top_k=top_k,
            top_p=top_p,
            output_format=video_format,
        )
        lines.finish()
    path = made.save(output)
    out.print(f"{path}  seed {made.seed}  {made.seconds:g} s", highlight=False, soft_wrap=True)
