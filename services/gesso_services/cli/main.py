"""The command ``gesso``: put together here, each group in a file of its own."""

from importlib.metadata import version as installed
from typing import Annotated

import typer

from gesso_services.cli import annotate, doctor, films, jobs, models, pictures, quantize, seeing, up
from gesso_services.cli.common import out

app = typer.Typer(
    name="gesso",
    help="Efficient visual generation as services: pictures from text, and talk about pictures, "
    "on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
START, PAINT, SEE, LOOK = "Start", "Paint", "See", "Look after"

app.command(rich_help_panel=START)(up.up)
app.command(rich_help_panel=START)(up.demo)
app.command(rich_help_panel=START)(up.serve)
app.command(rich_help_panel=START)(up.provision)
app.command(rich_help_panel=START)(up.deploy)
app.command(rich_help_panel=PAINT)(pictures.generate)
app.command(rich_help_panel=PAINT)(pictures.vary)
app.command(rich_help_panel=PAINT)(films.video)
app.command(rich_help_panel=PAINT)(pictures.reconstruct)
app.command(rich_help_panel=SEE)(seeing.ask)
app.command(rich_help_panel=SEE)(seeing.judge)
app.add_typer(annotate.app, name="annotate", rich_help_panel=SEE)
app.command(rich_help_panel=LOOK)(quantize.quantize)
app.add_typer(models.app, name="models", rich_help_panel=LOOK)
app.add_typer(jobs.app, name="jobs", rich_help_panel=LOOK)
app.command(rich_help_panel=LOOK)(doctor.doctor)


@app.command(rich_help_panel=LOOK)
def version() -> None:
    """Print the version."""
    out.print(f"gesso {installed('gesso')}", highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _gesso(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    return None


if __name__ == "__main__":
    app()
