"""The fixed prompts of the evaluation; which ones follows from the seed alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from gesso_core.evaluate.everyday import everyday_answers
from gesso_core.evaluate.references import References
from gesso_core.train.captions import ANY_STYLE, MAIN, WHITE, held_out_color, with_article
from gesso_core.train.compose import COLORS
from gesso_core.train.sprites import STYLES

COUNT = 100
SEED = 3
# Neither was used in training: the first arranges familiar words anew, the second has new words.
NEW_ARRANGEMENT = "{thing} in 3D style on a {color} background"
NEW_WORDING = "an illustration of {thing} in 3D style, with {color} all around it"
# Families whose members look alike are not asked for one by one.
ALIKE = ("face", "moon", "book", "heart", "globe", "medal")


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """A prompt, the concepts that answer it, and the style and color it asks for."""

    text: str
    concepts: frozenset[int]
    style: int
    color: int


def held_in(references: References) -> list[EvaluationPrompt]:
    """Compositions of concept, style and color that were trained."""
    return _compositions(
        references, lambda emoji, style, color: color != held_out_color(emoji, style)
    )


def held_out(references: References) -> list[EvaluationPrompt]:
    """Compositions that were never shown, each of parts that were."""
    return _compositions(
        references, lambda emoji, style, color: color == held_out_color(emoji, style)
    )


def trained_keywords(
    references: References, template: str = NEW_ARRANGEMENT
) -> list[EvaluationPrompt]:
    """Trained keywords in a template that was never used."""
    rng = random.Random(SEED)
    words = sorted({word for concept in references.concepts for word in concept.keywords})
    prompts = []
    for word in rng.sample(words, min(COUNT, len(words))):
        color = rng.randrange(1, len(COLORS))
        text = template.format(thing=with_article(word), color=COLORS[color])
        prompts.append(_prompt(text, _carriers(references, word), 0, color))
    return prompts


def reserved_keywords(references: References) -> list[EvaluationPrompt]:
    """Words that were kept out of training."""
    words = [(i, c.reserved) for i, c in enumerate(references.concepts) if c.reserved]
    picked = random.Random(SEED).sample(words, min(COUNT, len(words)))
    return [
        _prompt(f"{with_article(word)}, 3D style", frozenset({i}), 0, WHITE) for i, word in picked
    ]


def everyday(references: References) -> list[EvaluationPrompt]:
    """What anybody would type first: ``a car``."""
    position = {concept.name: i for i, concept in enumerate(references.concepts)}
    return [
        _prompt(
            with_article(word),
            frozenset(position[name] for name in names if name in position),
            ANY_STYLE,
            WHITE,
        )
        for word, names in everyday_answers().items()
    ]


def _prompt(text: str, concepts: frozenset[int], style: int, color: int) -> EvaluationPrompt:
    return EvaluationPrompt(text=text, concepts=concepts, style=style, color=color)


def _carriers(references: References, word: str) -> frozenset[int]:
    return frozenset(
        i
        for i, concept in enumerate(references.concepts)
        if word in concept.keywords or word == concept.name
    )


def _compositions(
    references: References, wanted: Callable[[str, str, int], bool]
) -> list[EvaluationPrompt]:
    rng, styles = random.Random(SEED), int(references.style_of_N.max()) + 1
    order = rng.sample(range(len(references.concepts)), len(references.concepts))
    prompts: list[EvaluationPrompt] = []
    for index in order:
        concept, style = references.concepts[index], rng.randrange(styles)
        colors = [k for k in range(1, len(COLORS)) if wanted(concept.emoji, STYLES[style], k)]
        color, reference = rng.choice(colors), references.find(index, style)
        if reference is None or not bool(references.visible(color)[reference]):
            continue
        if any(word in concept.name for word in ALIKE):
            continue
        text = MAIN.format(
            thing=with_article(concept.name), style=STYLES[style], color=COLORS[color]
        )
        prompts.append(_prompt(text, frozenset({index}), style, color))
        if len(prompts) == COUNT:
            break
    return prompts
