"""Text as a reader sees it: grapheme clusters, writing direction, names of scripts.

Clusters follow the rules of Unicode annex 29 as far as written words need them: marks, joiners,
flags, skin tones and Hangul letters stay with what they belong to.
"""

import unicodedata

_JOINER = "\u200d"
_HANGUL_LEAD = range(0x1100, 0x1160)
_HANGUL_VOWEL = range(0x1160, 0x11A8)
_HANGUL_TAIL = range(0x11A8, 0x1200)
_SYLLABLES = range(0xAC00, 0xD7A4)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_TAGS = range(0xE0020, 0xE0080)
# Marks of direction and of possible breaks: they stand in texts, never on a wall.
_INVISIBLE = frozenset(
    "\u00ad\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
)


def graphemes(text: str) -> list[str]:
    """The text cut into what a reader counts as characters, in logical order."""
    clusters: list[str] = []
    for character in text:
        if clusters and (not visible(clusters[-1]) or _belongs(clusters[-1], character)):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def visible(cluster: str) -> str:
    """The cluster without marks that nobody sees."""
    return "".join(character for character in cluster if character not in _INVISIBLE)


def is_extender(character: str) -> bool:
    """Whether the character has no shape of its own: a mark, joiner, selector or tag."""
    code = ord(character)
    return (
        unicodedata.category(character) in ("Mn", "Me", "Mc")
        or character in (_JOINER, "\u200c")
        or character in _INVISIBLE
        or code in _SKIN_TONES
        or code in _TAGS
    )


def is_right_to_left(text: str) -> bool:
    """Whether the first letter with a direction is Hebrew, Arabic or the like."""
    for character in text:
        direction = unicodedata.bidirectional(character)
        if direction in ("L", "R", "AL"):
            return direction != "L"
    return False


def visual_order(clusters: list[str]) -> list[int]:
    """Indices of the clusters from left to right, as they stand on the wall.

    One line, one level of nesting: a right-to-left text is turned round, and the runs of numbers
    and foreign letters in it are turned back; a left-to-right text turns its right-to-left runs.
    """
    right_to_left = is_right_to_left("".join(clusters))
    runs: list[list[int]] = []
    previous = None
    for index, cluster in enumerate(clusters):
        leftward = _runs_leftward(cluster, right_to_left, previous)
        if leftward == previous:
            runs[-1].append(index)
        else:
            runs.append([index])
        previous = leftward
    ordered = [
        run[::-1] if _runs_leftward(clusters[run[0]], right_to_left, None) else run for run in runs
    ]
    return [index for run in (ordered[::-1] if right_to_left else ordered) for index in run]


def script_of(character: str) -> str:
    """The script's name as Unicode spells it in the character's name, e.g. "HANGUL"."""
    first = (visible(character) or character)[0]
    name = unicodedata.name(first, "")
    return name.split(" ")[0].split("-")[0] if name else f"U+{ord(first):04X}"


def _runs_leftward(cluster: str, base: bool, previous: bool | None) -> bool:
    """Direction of one cluster; what has none of its own follows its neighbour or the text."""
    direction = unicodedata.bidirectional(cluster[0])
    if direction in ("R", "AL"):
        return True
    if direction in ("L", "EN", "AN"):
        return False
    return base if previous is None else (previous if previous == base else base)


def _belongs(cluster: str, character: str) -> bool:
    last, code, before = cluster[-1], ord(character), ord(cluster[-1])
    if is_extender(character):
        # Behind a space a mark belongs to what comes next: spaces stay spaces.
        return not (cluster.isspace() and character in _INVISIBLE)
    if last == _JOINER and unicodedata.category(character) == "So":
        return True
    if code in _FLAG_LETTERS:
        return len(cluster) == 1 and before in _FLAG_LETTERS
    return _continues_syllable(before, code)


def _continues_syllable(before: int, code: int) -> bool:
    """Whether a Hangul letter belongs to the syllable before it."""
    if code in _HANGUL_LEAD:
        return before in _HANGUL_LEAD
    if code in _HANGUL_VOWEL:
        open_syllable = before in _SYLLABLES and (before - 0xAC00) % 28 == 0
        return before in _HANGUL_LEAD or before in _HANGUL_VOWEL or open_syllable
    if code in _HANGUL_TAIL:
        return before in _HANGUL_VOWEL or before in _HANGUL_TAIL or before in _SYLLABLES
    return False
