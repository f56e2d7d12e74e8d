"""What every command shares: the console, the way errors are shown, and how to reach a server."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from gesso_core.errors import GessoError, InvalidRequest
from gesso_core.registry import MODELS
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gesso_services.client import DEFAULT_URL, Gesso

out = Console()
err = Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="GESSO_URL", help="Where the gateway is.", rich_help_panel="Server"
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="GESSO_API_KEY",
        help="API key, if the server wants one.",
        show_default=False,
        rich_help_panel="Server",
    ),
]

Local = Annotated[bool, typer.Option("--local", help="In this process, without a server.")]


def one_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end with one sentence and exit code 1 where a gesso error would leave it."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except GessoError as error:
            complain(error.message)
            raise typer.Exit(1) from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            complain(f"{place}{error.strerror or error}")
            raise typer.Exit(1) from None

    return run


def name_or_folder(given: str) -> str | Path:
    """A model as it is typed: a name that gesso knows, or else a folder.

    Raises:
        InvalidRequest: a file, or a path to nothing.
    """
    path = Path(given)
    if given in MODELS:
        return given
    if path.is_dir():
        return path
    if path.exists() or given != path.name or path.suffix == ".safetensors":
        what = "is a file" if path.exists() else "does not exist"
        raise InvalidRequest(
            f"{given} {what}; give the folder of a model, or a name from: gesso models list",
            field="model",
        )
    return given


def complain(sentence: str) -> None:
    """What went wrong, in one sentence to standard error."""
    _say("[bold red]error[/]", sentence)


def remark(sentence: str) -> None:
    """What is worth knowing, in one sentence to standard error."""
    _say("[bold yellow]note[/]", sentence)


def _say(mark: str, sentence: str) -> None:
    err.print(mark, end=" ")
    err.print(sentence, markup=False, highlight=False, soft_wrap=True)


def server(url: str = DEFAULT_URL, key: str | None = None) -> Gesso:
    """A client for the server the options name."""
    return Gesso(url, key)


@contextmanager
def progress_bars(**options: Any) -> Iterator[Progress]:
    """Bars on standard error, so that standard output stays clean for pipes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, **options) as bars:
        yield bars
