"""``gesso quantize``: a model in 4 or 8 bit, from the 16-bit one, here and resumable."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from gesso_core.errors import InvalidRequest
from gesso_core.registry import MODELS

from gesso_services.cli.common import name_or_folder, one_sentence, out, progress_bars, remark

if TYPE_CHECKING:
    from gesso_core.ptq.driver import Stage
    from rich.progress import Progress as Bars

Target = Literal["int4", "nvfp4", "w8a8"]
STAGES = ("calibrating", "quantizing")


@one_sentence
def quantize(
    *,
    model: Annotated[str, typer.Argument(help="A name from `gesso models list`, or a folder.")],
    to: Annotated[Target, typer.Option(help="Number format of weights and inputs.")],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: MODEL-FORMAT.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, max=1024, help="Of the 16-bit branch.")] = 32,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="Compensate rounding errors; better, slower.")
    ] = False,
    exact_svd: Annotated[
        bool, typer.Option("--exact-svd", help="In float64; far slower, hardly better.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file to calibrate on, one prompt per line.", dir_okay=False),
    ] = None,
    captured: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the captured inputs in, for several formats of one model.",
            file_okay=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of every calibration picture.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 12345,
    keep_cross_kv: Annotated[
        bool,
        typer.Option("--keep-cross-kv", help="Leave keys and values of the text in 16 bit."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier run left, captures too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the errors of the layers into this PNG.")
    ] = None,
) -> None:
    """Quantize a model with SVDQuant: calibrate, quantize layer by layer, report the errors.

    Stopped at any moment, the same command goes on: finished layers stay, an unfinished
    calibration begins again.
    """
    source = name_or_folder(model)
    name = source if isinstance(source, str) else source.resolve().name
    target = output or Path(f"{name}-{to}")
    if plot is not None and plot.suffix.lower() != ".png":
        raise InvalidRequest(f"{plot} must end in .png")

    from gesso_core.ptq.driver import quantize_model
    from gesso_core.ptq.prompts import read_prompts
    from gesso_core.ptq.report import plot_errors

    texts = None if prompts is None else read_prompts(prompts)
    try:
        with progress_bars() as bars:
            report = quantize_model(
                source,
                target,
                to=to,
                rank=rank,
                gptq=gptq,
                svd="exact" if exact_svd else "randomized",
                layers="sana-nunchaku" if keep_cross_kv else "sana",
                prompts=texts,
                steps=steps,
                seed=seed,
                captured=captured,
                on_progress=_Lines(bars).show,
                resume=not fresh,
            )
    except KeyboardInterrupt:
        remark("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    out.print(report.markdown(), markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        plot_errors([report], plot)
    # A name of the registry would win over the folder.
    shown = f"./{target}" if str(target) in MODELS else str(target)
    use = (
        f"paint with it: gesso generate --local --model {shown} PROMPT"
        if isinstance(source, str)
        else f"put it in the place of {source / 'transformer'}"
    )
    out.print(
        f"{shown} holds the quantized model; {use}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


class _Lines:
    """One bar for the calibration, one for the layers."""

    def __init__(self, bars: "Bars") -> None:
        self.bars = bars
        self.tasks = {stage: bars.add_task(stage, total=None, note="") for stage in STAGES}

    def show(self, stage: "Stage", done: int, total: int, name: str) -> None:
        note = name or f"step {done}/{total}"
        self.bars.update(self.tasks[stage], completed=done, total=total, note=note)
