"""The caption grammar: what a person might type for a picture, and which picture answers it.

A record is a caption with the concept, the style (or any) and the background color that it asks
for. White is the background of captions that name none. One non-white color per (concept, style) is
never shown: these held-out compositions measure whether color and thing are understood apart.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gesso_core.train.compose import COLORS
from gesso_core.train.concepts import Concept, md5_int
from gesso_core.train.sprites import STYLES

ANY_STYLE = -1
WHITE = 0

# Shares of the grammar; {thing} has an article in two thirds of the captions.
MAIN = "{thing}, {style} style, on a {color} background"
STYLED = ("{thing}, {style} style", "{thing} in {style} style", "a {style} {bare}")
PLAIN = ("{thing}", "{bare}")
COLORED = (
    "{thing} on a {color} background",
    "{thing}, {color} background",
    "{thing} on {color}",
)
VERBOSE_COLORED = (
    "on a {color} background there is {thing}",
    "picture of {thing}, {color} backdrop",
    "{style} drawing of {thing} on a {color} background",
    "{color} background, {style} style, {thing}",
    "an image of {thing} in front of a {color} background",
)
VERBOSE = (
    "{style} drawing of {thing}",
    "a picture of {thing}",
    "an image of {thing}",
    "draw {thing}",
    "{style} emoji of {thing}",
    "an emoji of {thing}",
    "a photo of {thing}",
    "one {bare}",
    "the {bare}",
    "a small {bare}",
)
TEMPLATES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.34, (MAIN,)),
    (0.15, STYLED),
    (0.18, PLAIN),
    (0.13, COLORED),
    (0.10, VERBOSE_COLORED),
    (0.10, VERBOSE),
)
WORDS: tuple[tuple[float, str], ...] = (
    (0.52, "name"),
    (0.36, "keyword"),
    (0.07, "keyword and name"),
    (0.05, "keywords"),
)


@dataclass(frozen=True, kw_only=True)
class CaptionRecord:
    """One caption and the picture that answers it."""

    text: str
    concept: int
    style: int  # index into STYLES, or ANY_STYLE
    color: int  # index into COLORS
    named: bool = True  # says the concept's own name, and nothing ambiguous


def held_out_color(emoji: str, style: str) -> int:
    """The one color, never white, that this sprite is never shown on."""
    return 1 + md5_int(emoji + style) % (len(COLORS) - 1)


def with_article(word: str) -> str:
    """``word`` with ``a`` or ``an``."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def draw_record(concepts: Sequence[Concept], index: int, rng: random.Random) -> CaptionRecord:
    """A random caption of concept number ``index``."""
    concept = concepts[index]
    (templates,) = rng.choices([t for _, t in TEMPLATES], [w for w, _ in TEMPLATES])
    template = rng.choice(templates)
    style = rng.randrange(len(STYLES)) if "{style}" in template else ANY_STYLE
    color = WHITE
    if "{color}" in template:
        color = rng.choice(_allowed_colors(concept, style))
    bare = _words(concept, rng)
    named = bare == concept.name
    thing = with_article(bare) if rng.random() < 2 / 3 else bare
    text = template.format(thing=thing, bare=bare, style=STYLES[style], color=COLORS[color])
    return CaptionRecord(
        text=_typed(text, rng), concept=index, style=style, color=color, named=named
    )


def draw_records(concepts: Sequence[Concept], count: int, seed: int) -> list[CaptionRecord]:
    """``count`` captions, the same number for every concept up to one."""
    rng = random.Random(seed)
    return [draw_record(concepts, i % len(concepts), rng) for i in range(count)]


def filler_phrases() -> list[str]:
    """What remains of the grammar's captions without a thing: style, color and connecting words."""
    phrases = [
        template.format(thing="a", bare="", style=STYLES[i % len(STYLES)], color=color)
        for _, templates in TEMPLATES
        for template in templates
        for i, color in enumerate(COLORS)
    ]
    return [*dict.fromkeys(phrase.strip(" ,") for phrase in phrases)]


def _allowed_colors(concept: Concept, style: int) -> list[int]:
    if style == ANY_STYLE:
        return list(range(len(COLORS)))
    hidden = held_out_color(concept.emoji, STYLES[style])
    return [color for color in range(len(COLORS)) if color != hidden]


def _words(concept: Concept, rng: random.Random) -> str:
    (kind,) = rng.choices([k for _, k in WORDS], [w for w, _ in WORDS])
    if kind == "name" or not concept.keywords:
        return concept.name
    if kind == "keywords":
        count = min(3, len(concept.keywords))
        return ", ".join(rng.sample(concept.keywords, count))
    keyword = rng.choice(concept.keywords)
    return keyword if kind == "keyword" else f"{keyword} {concept.name}"


def _typed(text: str, rng: random.Random) -> str:
    """Capital letters and full stops as people happen to type them."""
    chance = rng.random()
    if chance < 0.2:
        text = text[0].upper() + text[1:]
    elif chance < 0.35:
        text = text.lower()
    return f"{text}." if rng.random() < 0.08 else text
