"""What a run was asked for, kept beside its work, so that the work of two runs is never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gesso_core.errors import WeightsError

LONGEST: Final = 24


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise `WeightsError` naming what differs between the choices ``found`` and ``wanted``.

    ``what`` says where the found ones were, and reads on with "was made with other choices".
    """
    wanted = json.loads(json.dumps(wanted))
    if different := _differing(found, wanted):
        told = ", ".join(_difference(key, found.get(key), wanted.get(key)) for key in different)
        raise WeightsError(
            f"{what} was made with other choices ({told}); choose the same, another folder, or "
            "begin anew with --fresh"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return sorted(k for k in wanted.keys() | found.keys() if found.get(k) != wanted.get(k))


def _difference(key: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        inner = _differing(found, wanted)
        return ", ".join(f"{key} {_difference(k, found.get(k), wanted.get(k))}" for k in inner)
    return f"{key} {_short(found)} instead of {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
