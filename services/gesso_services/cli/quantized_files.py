"""``gesso models import-quantized`` and ``export-quantized``: files of other quantization tools."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from gesso_core.errors import InvalidRequest
from gesso_core.registry import find

from gesso_services.cli.common import err, name_or_folder, one_sentence, out, remark

ExportFormat = Literal["nunchaku-v1", "nunchaku-v2", "nunchaku-lite", "nunchaku-legacy"]


@one_sentence
def import_quantized(
    *,
    source: Annotated[Path, typer.Argument(help="A file or folder of another tool.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The 16-bit model it was made from, by its name here.")
    ] = None,
) -> None:
    """Turn a quantized model of nunchaku, deepcompressor or ModelOpt into one of gesso."""
    from gesso_core.interchange.formats import detect_format
    from gesso_core.interchange.formats import import_quantized as read
    from gesso_core.quant.canonical import CANONICAL_FILE, write_canonical
    from gesso_core.safe_files import read_json

    target = folder / CANONICAL_FILE
    if target.exists():
        raise InvalidRequest(f"{target} is there already; give another folder")
    kind = detect_format(source)
    with err.status(f"reading {source.name}, {kind}"):
        content = read(source)
    if model is not None:
        content = replace(content, made_by={**content.made_by, "model": find(model).name})
    write_canonical(target, content)
    beside = source / "config.json"
    if config := content.made_by.get("config") or (beside.is_file() and read_json(beside)):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    else:
        remark(f"{source} has no configuration; put the config.json of its model into {folder}")
    _tell(target, len(content.layers), f"from {kind}")


@one_sentence
def export_quantized(
    *,
    model: Annotated[
        str, typer.Argument(help="A quantized model: its folder, or its name if it ships.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write; a folder for lite, legacy.")
    ],
    file_format: Annotated[ExportFormat, typer.Option("--format")] = "nunchaku-v1",
) -> None:
    """Write a quantized model in a format of the nunchaku engine."""
    from gesso_core import hub
    from gesso_core.interchange.formats import export_quantized as write
    from gesso_core.interchange.nunchaku.sana import text_layers
    from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
    from gesso_core.safe_files import read_json

    if target.exists():
        raise InvalidRequest(f"{target} is there already; give another name")
    folder = hub.resolve(name_or_folder(model))
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not hub.is_quantized(folder):
        raise InvalidRequest(
            f"{model} is not quantized: {folder} has no {CANONICAL_FILE}; run gesso quantize, then "
            "export what it makes",
            field="model",
        )
    with err.status(f"writing {target.name}"):
        content = read_canonical(folder / CANONICAL_FILE)
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
        write(content, target, format=file_format, config=config)
    if dense := text_layers(content):
        remark(
            f"keys and values of the text ({len(dense)} layers) were written in 16 bit, as the "
            "engine has them"
        )
    _tell(target, len(content.layers) - len(dense), f"as {file_format}")


def _tell(path: Path, layers: int, how: str) -> None:
    out.print(f"{path}  {layers} quantized layers, {how}", highlight=False, soft_wrap=True)
