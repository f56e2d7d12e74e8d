"""Words that anybody would try first, each with the concepts that answer it."""

import json
from importlib.resources import files


def everyday_answers() -> dict[str, tuple[str, ...]]:
    """Word to names of acceptable concepts, hand-written."""
    text = (files("gesso_core.evaluate") / "everyday_words.json").read_text()
    return {word: tuple(names) for word, names in json.loads(text).items()}
