"""Models that run through transformers, from a folder, and what text encoders have beside them."""

from pathlib import Path
from typing import Any

import torch

from gesso_core.errors import WeightsError
from gesso_core.safe_files import read_header


def load_model(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    expected: str,
    without_head: bool = False,
    attention: str = "eager",
) -> Any:
    """A model of the class ``kind`` from safetensors files; nothing is downloaded.

    Args:
        kind: a model class of transformers, such as ``Gemma2Model``.
        folder: with the configuration and the weights.
        dtype: of the loaded weights.
        expected: what kind of folder this is, for the person who gave another one.
        without_head: the files may hold more than the model has: the head that predicts tokens.
        attention: how attention is computed; the soft cap of Gemma-2 is applied by "eager" only.

    Raises:
        WeightsError: a missing file, or weights that do not fill the model.
    """
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"cannot load {kind.__name__} from {folder}: {str(error).splitlines()[0]}; "
            f"expected {expected}"
        ) from error
    problems = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if without_head:
        problems.pop("unexpected_keys", None)
    if problems:
        raise WeightsError(f"the weights in {folder} do not fill {kind.__name__}: {problems}")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; nothing is downloaded.

    Raises:
        WeightsError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"cannot load a tokenizer from {folder}: {str(error).splitlines()[0]}"
        ) from error


def read_instruction(path: Path) -> str:
    """An instruction from a text file, unchanged but for a final line break.

    Raises:
        WeightsError: the file cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot read the instruction {path}: {error}") from error
    if not text:
        raise WeightsError(f"the instruction file {path} is empty; write the instruction into it")
    return text
