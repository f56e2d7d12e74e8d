"""What the small models can draw: concepts with their names, words and splits.

A concept is one emoji of Unicode CLDR. All splits follow from md5 of the emoji, so that they need
no file and never change.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

HELD_OUT_ONE_IN = 20
RESERVED_ONE_IN = 2
MIN_WORDS_TO_RESERVE = 4
SKIN_TONES = tuple(chr(code) for code in range(0x1F3FB, 0x1F400))


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One drawable thing: its name, the other words for it, and one word kept for evaluation."""

    emoji: str
    name: str
    keywords: tuple[str, ...]
    reserved: str | None

    @property
    def key(self) -> str:
        """Code points in hex without the variation selector, as image packages name files."""
        return "-".join(f"{ord(c):04x}" for c in self.emoji if c != "\ufe0f")

    @property
    def held_out(self) -> bool:
        """Whether the autoencoder never sees this concept."""
        return md5_int(self.emoji) % HELD_OUT_ONE_IN == 0


def md5_int(key: str) -> int:
    """A stable pseudo-random integer of a string."""
    return int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16)


def everyday_names() -> frozenset[str]:
    """Names of the concepts of the CPU profile."""
    return frozenset(everyday_words())


def everyday_words() -> dict[str, tuple[str, ...]]:
    """Names of the CPU profile's concepts, each with the words that CLDR lacks for it."""
    lines = (files("gesso_core.train") / "everyday.txt").read_text().splitlines()
    pairs = (line.partition(" = ") for line in lines if line and not line.startswith("#"))
    return {name: tuple(filter(None, extra.split(", "))) for name, _, extra in pairs}


def read_concepts(
    emoji_table: Mapping[str, Any], annotations: Mapping[str, Any], protected: frozenset[str]
) -> list[Concept]:
    """All drawable concepts of the two JSON tables, without flags and skin tones.

    ``protected`` words are never reserved for evaluation.
    """
    labelled = {
        emoji: label
        for emoji, entry in emoji_table.items()
        if entry["group"] != "Flags"
        and not any(tone in emoji for tone in SKIN_TONES)
        and (label := _label(annotations, emoji))
    }
    extra = everyday_words()
    words = {emoji: _words(label, extra) for emoji, label in labelled.items()}
    owners = Counter(word for known in words.values() for word in known)
    protected = protected.union(*extra.values())
    return [
        _concept(emoji, _plain(label["tts"][0]), words[emoji], owners, protected)
        for emoji, label in labelled.items()
    ]


def select(concepts: Sequence[Concept], names: frozenset[str]) -> list[Concept]:
    """The concepts with one of the given names, in the order of the table."""
    return [concept for concept in concepts if concept.name in names]


def _label(annotations: Mapping[str, Any], emoji: str) -> dict[str, list[str]] | None:
    label = annotations.get(emoji) or annotations.get(emoji.replace("\ufe0f", ""))
    return cast("dict[str, list[str]] | None", label)


def _plain(text: str) -> str:
    return text.replace("\u2019", "'")


def _words(label: Mapping[str, list[str]], extra: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    name = _plain(label["tts"][0])
    known = dict.fromkeys(_plain(word) for word in label.get("default", []))
    known |= dict.fromkeys(extra.get(name, ()))
    return tuple(word for word in known if word != name and len(word) > 1)


def _concept(
    emoji: str,
    name: str,
    words: tuple[str, ...],
    owners: Mapping[str, int],
    protected: frozenset[str],
) -> Concept:
    own = [word for word in words if owners[word] == 1 and word not in protected]
    eligible = (
        len(words) >= MIN_WORDS_TO_RESERVE and md5_int(f"reserve {emoji}") % RESERVED_ONE_IN == 0
    )
    reserved = min(own, key=lambda word: md5_int(f"{emoji} {word}")) if own and eligible else None
    keywords = tuple(word for word in words if word != reserved)
    return Concept(emoji=emoji, name=name, keywords=keywords, reserved=reserved)
