"""``gesso models``: what there is, and the weights behind it."""

from pathlib import Path
from typing import Annotated

import typer
from gesso_core.errors import GessoError, WeightsError
from gesso_core.registry import MODELS, ModelEntry
from rich.table import Table

from gesso_services.cli import quantized_files
from gesso_services.cli.common import complain, err, name_or_folder, one_sentence, out

app = typer.Typer(no_args_is_help=True, help="List, pull, verify and convert models.")
Name = Annotated[str, typer.Argument(help="A name from `gesso models list`.")]


@app.command("list")
@one_sentence
def list_models() -> None:
    """Show every model that gesso knows, and whether its weights are on this machine."""
    table = Table(box=None)
    table.add_column("model", no_wrap=True)
    table.add_column("for", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    table.add_column("what")
    for entry in MODELS.values():
        table.add_row(entry.name, "\n".join(entry.tasks), _where(entry), entry.summary)
    out.print(table)
    out.print("weights that are not here come with: gesso models pull NAME", style="dim")
    out.print("those of sam-mobile come with: make models", style="dim")


@app.command()
@one_sentence
def pull(
    name: Name,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Fetch a published model from its hub repository, and verify what arrived."""
    from gesso_core import hub

    err.print(f"pulling {name}", highlight=False)
    folder = hub.pull(name, revision)
    _verify(folder)
    out.print(f"{name} is in {folder}", highlight=False, soft_wrap=True)


@app.command()
@one_sentence
def verify(
    name: Annotated[str, typer.Argument(help="A name, or a model folder.")],
    deep: Annotated[bool, typer.Option(help="Also look for NaN and infinity.")] = False,
) -> None:
    """Compare the files of a model with their manifest."""
    _verify(_folder_of(name), deep=deep)
    out.print(f"{name} is as it should be", highlight=False)


@app.command()
@one_sentence
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, .pt or .bin file.", dir_okay=False)],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Rewrite a pickle as safetensors; only tensors are read, nothing in the file runs."""
    from gesso_core import hub

    with err.status(f"converting {source.name}"):
        keys = hub.convert_pickle(source, target)
    out.print(f"{target}  {len(keys)} tensors", highlight=False, soft_wrap=True)


app.command("import-quantized")(quantized_files.import_quantized)
app.command("export-quantized")(quantized_files.export_quantized)


def _where(entry: ModelEntry) -> str:
    from gesso_core import hub

    try:
        hub.resolve(entry.name)
    except GessoError:
        return "not here"
    return "shipped" if entry.shipped else "here" if entry.package else "pulled"


def _folder_of(name: str) -> Path:
    from gesso_core import hub

    return hub.resolve(name_or_folder(name))


def _verify(folder: Path, *, deep: bool = False) -> None:
    from gesso_core import hub

    with err.status(f"verifying {folder.name}"):
        reports = hub.verify(folder, deep=deep)
    wrong = [report for report in reports if not report.ok]
    for report in wrong:
        complain(f"{report.name}: {report.problem}")
    if wrong:
        raise WeightsError(f"{len(wrong)} of {len(reports)} files in {folder} are not well")
