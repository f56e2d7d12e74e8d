"""What the small VILA-U is asked: conversations about a picture, and requests for one.

Every conversation is built from a picture that is known by its concept, its style and its color.
Questions come in several phrasings; answers are short. "No" is answered to captions with exactly
one thing wrong, which is the hard kind.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gesso_core.models.vila_u.template import (
    CAPTION_QUESTION,
    JUDGE_QUESTION,
    PLACEHOLDER,
    Turn,
)
from gesso_core.train.captions import MAIN, with_article
from gesso_core.train.compose import COLORS
from gesso_core.train.concepts import Concept, md5_int
from gesso_core.train.sprites import STYLES

YES, NO = "yes", "no"
CAPTION = (
    CAPTION_QUESTION,
    "Describe this image.",
    "caption this picture",
    "write a caption",
    "what do you see?",
)
WHAT = (
    "what is it?",
    "What is this?",
    "what does the picture show?",
    "which thing is in the picture?",
    "name the object",
)
COLOR = (
    "which color is the background?",
    "What color is the background?",
    "which colour is behind it?",
    "background color?",
)
STYLE = (
    "which style is it?",
    "What style is this drawn in?",
    "in which style is the picture?",
    "is it 3D or flat?",
)
IS_THING = ("is it {thing}?", "Is this {thing}?", "is {thing} in the picture?")
IS_COLOR = ("is the background {color}?", "Is it on a {color} background?")
IS_STYLE = ("is it in {style} style?", "Is the style {style}?")
CAPTIONS_TO_JUDGE = (
    MAIN,
    "{thing}, {style} style",
    "{thing} on a {color} background",
    "{thing} in {style} style on a {color} background",
    "{thing}",
)
NEW_COLOR = ("draw it on a {color} background", "the same on {color}")
NEW_STYLE = ("draw it in {style} style", "the same in {style} style")
ABOUT_COLORS = ("which background colors can you draw?", "Which colors do you know?")
ABOUT_STYLES = ("which styles do you know?", "In which styles can you draw?")
ABOUT_WORD = ("which thing is called {word}?", "what is {word}?")
UNSEEN_ONE_IN = 12


@dataclass(frozen=True)
class Shown:
    """What a picture shows: numbers of its concept, of its style and of its color."""

    concept: int
    style: int
    color: int


def unseen_style(concept: Concept, style: int, styles: Sequence[int]) -> bool:
    """Whether the language model never sees the concept in this style; it sees it in another.

    ``styles`` are those that the concept has pictures of.
    """
    chosen = [
        s for s in styles if md5_int(f"unseen {concept.emoji} {STYLES[s]}") % UNSEEN_ONE_IN == 0
    ]
    return len(styles) > 1 and style == next(iter(chosen), None)


def thing_of(concept: Concept) -> str:
    """The name of a concept with an article, unless it is a plural."""
    name = concept.name
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else with_article(name)


def describe(concepts: Sequence[Concept], shown: Shown, pattern: str = MAIN) -> str:
    """The caption of a picture."""
    return pattern.format(
        thing=thing_of(concepts[shown.concept]),
        style=STYLES[shown.style],
        color=COLORS[shown.color],
    )


def judge_question(caption: str) -> str:
    """The question whose answer is yes or no; a caption may be a prompt with its full stop."""
    return JUDGE_QUESTION.format(caption=caption.strip().rstrip(".?!"))


def with_picture(question: str) -> str:
    """A question about the picture in front of it."""
    return f"{PLACEHOLDER}\n{question}"


class Questions:
    """Draws conversations; ``styles`` are the numbers of the styles in use."""

    def __init__(self, concepts: Sequence[Concept], styles: Sequence[int], rng: random.Random):
        self.concepts, self.styles, self.rng = concepts, tuple(styles), rng

    def about(self, shown: Shown, turns: int) -> list[Turn]:
        """A conversation of ``turns`` questions about one picture, mostly of different kinds."""
        kinds = [self._caption, self._what, self._color, self._style]
        weights = [4, 2, 0.8, 2.5]
        pairs: list[tuple[str, str]] = []
        for _ in range(turns):
            (number,) = self.rng.choices(range(len(kinds)), weights)
            pairs.append(kinds[number](shown))
            weights[number] /= 4
        return _conversation(pairs)

    def claims(self, shown: Shown, turns: int) -> list[Turn]:
        """A conversation of claims about one picture, each answered with yes or no.

        Every other one begins with the caption: two texts are easier to compare than a text and a
        picture, and who can do the one learns the other sooner.
        """
        kinds = (self._judge, self._is, self._is)
        captions = [self._caption(shown)] if self.rng.random() < 0.5 else []
        claims = [self.rng.choice(kinds)(shown) for _ in range(turns - len(captions))]
        return _conversation([*captions, *claims])

    def change(self, shown: Shown, changed: Shown) -> str:
        """The request that turns one picture into another of the same thing."""
        patterns = NEW_COLOR if shown.style == changed.style else NEW_STYLE
        return with_picture(describe(self.concepts, changed, self.rng.choice(patterns)))

    def text_only(self) -> tuple[str, str]:
        """A question without a picture, and its answer."""
        kind = self.rng.random()
        if kind < 0.1:
            return self.rng.choice(ABOUT_COLORS), ", ".join(COLORS)
        if kind < 0.2:
            return self.rng.choice(ABOUT_STYLES), ", ".join(STYLES[s] for s in self.styles)
        concept = self.rng.choice([c for c in self.concepts if c.keywords])
        word = self.rng.choice(concept.keywords)
        return self.rng.choice(ABOUT_WORD).format(word=word), concept.name

    def judgement(self, shown: Shown, *, true: bool) -> tuple[str, str]:
        """Whether a picture shows a caption, which it does, or does but for one thing."""
        pattern = self.rng.choice(CAPTIONS_TO_JUDGE)
        claimed = shown if true else self._wrong_in(shown, pattern)
        question = judge_question(describe(self.concepts, claimed, pattern))
        return question, YES if true else NO

    def wrong(self, shown: Shown) -> Shown:
        """The same with one thing changed: the concept, the style or the color."""
        part = self.rng.choice(("concept", "concept", "color", "style"))
        return replace(shown, **{part: self._other(part, getattr(shown, part))})

    def _other(self, part: str, present: int) -> int:
        choices = {
            "concept": range(len(self.concepts)),
            "color": range(len(COLORS)),
            "style": self.styles,
        }[part]
        name = self.concepts[present].name if part == "concept" else ""
        while True:
            other = self.rng.choice(choices)
            if other != present and (not name or self.concepts[other].name != name):
                return other

    def _caption(self, shown: Shown) -> tuple[str, str]:
        return self.rng.choice(CAPTION), describe(self.concepts, shown)

    def _what(self, shown: Shown) -> tuple[str, str]:
        return self.rng.choice(WHAT), self.concepts[shown.concept].name

    def _color(self, shown: Shown) -> tuple[str, str]:
        return self.rng.choice(COLOR), COLORS[shown.color]

    def _style(self, shown: Shown) -> tuple[str, str]:
        return self.rng.choice(STYLE), STYLES[shown.style]

    def _judge(self, shown: Shown) -> tuple[str, str]:
        return self.judgement(shown, true=self.rng.random() < 0.5)

    def _wrong_in(self, shown: Shown, pattern: str) -> Shown:
        """Wrong in a thing that the caption mentions."""
        while True:
            claimed = self.wrong(shown)
            if describe(self.concepts, claimed, pattern) != describe(self.concepts, shown, pattern):
                return claimed

    def _is(self, shown: Shown) -> tuple[str, str]:
        patterns = self.rng.choice((IS_THING, IS_COLOR, IS_COLOR, IS_STYLE))
        pattern = self.rng.choice(patterns)
        claimed = self._wrong_in(shown, pattern) if self.rng.random() < 0.5 else shown
        return describe(self.concepts, claimed, pattern), YES if claimed == shown else NO


def _conversation(pairs: Sequence[tuple[str, str]]) -> list[Turn]:
    """Questions and answers in turns; the picture stands before the first question."""
    conversation: list[Turn] = []
    for number, (asked, said) in enumerate(pairs):
        question = asked if number else with_picture(asked)
        conversation += [Turn(role="user", text=question), Turn(role="assistant", text=said)]
    return conversation
