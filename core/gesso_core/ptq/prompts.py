"""Which prompts a model is calibrated on: its own training captions, or a file of the user's."""

import random
from pathlib import Path
from typing import Final

from gesso_core.errors import InvalidRequest
from gesso_core.evaluate.references import load_references
from gesso_core.hub import DEFAULT_STORE, resolve_parts
from gesso_core.train.captions import draw_record

DEFAULT_COUNT: Final = 128
MAX_FILE_BYTES: Final = 1024 * 1024
MAX_PROMPTS: Final = 4096
MAX_LETTERS: Final = 4000
REFERENCES: Final = "references.safetensors"


def default_prompts(
    name_or_folder: str | Path,
    count: int = DEFAULT_COUNT,
    *,
    seed: int = 0,
    store: Path = DEFAULT_STORE,
) -> list[str]:
    """Captions of the grammar that the small models were trained on, each of another concept.

    Raises:
        InvalidRequest: the model keeps no concepts beside its weights; its prompts must be given.
    """
    path = resolve_parts(name_or_folder, store=store).transformer / REFERENCES
    if not path.is_file():
        raise InvalidRequest(
            f"{name_or_folder} brings no calibration prompts; give about {DEFAULT_COUNT} of the "
            "kind it will be used for, one per line, with --prompts FILE",
            field="prompts",
        )
    concepts, rng = load_references(path).concepts, random.Random(seed)
    chosen = rng.sample(range(len(concepts)), min(count, len(concepts)))
    return [draw_record(concepts, index, rng).text for index in chosen]


def read_prompts(path: Path) -> list[str]:
    """Prompts from a UTF-8 text file, one per line; empty lines are left out.

    Raises:
        InvalidRequest: no such file, not text, nothing in it, or more than the limits allow.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise _refused(path, f"has more than {MAX_FILE_BYTES:,} bytes; shorten it")
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except OSError as error:
        raise _refused(
            path, f"cannot be read ({error.strerror}); give a text file with one prompt per line"
        ) from error
    except UnicodeDecodeError as error:
        raise _refused(path, f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return checked_prompts([line for line in lines if line], str(path))


def checked_prompts(prompts: list[str], source: str) -> list[str]:
    """The prompts, if there are some, not too many and none too long; else InvalidRequest."""
    if not prompts:
        raise _refused(source, "has no prompts; calibration needs some, one per line")
    if len(prompts) > MAX_PROMPTS:
        raise _refused(source, f"has {len(prompts):,} prompts, at most {MAX_PROMPTS:,} are allowed")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > MAX_LETTERS:
            raise _refused(
                source,
                f"has {len(prompt):,} letters in prompt {number}, at most {MAX_LETTERS:,} are "
                "allowed",
            )
    return prompts


def _refused(source: str | Path, what: str) -> InvalidRequest:
    return InvalidRequest(f"{source} {what}", field="prompts")
