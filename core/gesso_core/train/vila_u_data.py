"""Lessons for the small VILA-U: pictures as codes, and the streams of tokens built around them.

The frozen tower encodes every view once. A lesson is one stream: a conversation about a picture, a
caption and its picture, a picture and the changed one that was asked for, or text alone.
Axes: N sprites, K palette colors, V views, T visual tokens, D codes of a visual token.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.splice import Picture, Row, splice
from gesso_core.models.vila_u.template import (
    PLACEHOLDER,
    Tokenizer,
    Turn,
    picture_prompt,
    training_ids,
)
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.train.captions import ANY_STYLE, MAIN, draw_record
from gesso_core.train.compose import (
    COLORS,
    augment,
    composite,
    palette_colors,
    shrink,
    sprites_to_float,
)
from gesso_core.train.latents import shown_compositions
from gesso_core.train.questions import Questions, Shown, describe, unseen_style
from gesso_core.train.sprites import SpriteSet

VIEWS = 4
CHUNK = 64
TURNS = (1, 1, 2)  # of a conversation; a later answer can often be read off an earlier one
CLAIMS, CLAIM_TURNS = 0.4, 3  # share of conversations of yes and no, and their length
# Shares of lessons. Those that ask for a picture without saying which serve guidance.
SEE, DRAW, CHANGE, TALK = 0.24, 0.68, 0.05, 0.03
UNCONDITIONAL = 0.1
PLAIN_VIEW = 0.95  # share of pictures to draw that show the sprite unmoved


@dataclass(frozen=True, kw_only=True)
class CodedViews:
    """Codes of every sprite on every color; view 0 is the sprite as it is."""

    codes_NKVTD: Tensor  # int16

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"codes": self.codes_NKVTD}, path)

    @classmethod
    def load(cls, path: Path) -> "CodedViews":
        """Read what ``save`` wrote."""
        return cls(codes_NKVTD=load_file(path)["codes"])


@torch.no_grad()
def encode_views(
    tower: VisionTower, sprites: SpriteSet, *, size: int, views: int = VIEWS, seed: int = 11
) -> CodedViews:
    """Encode every sprite on every color in ``views`` views.

    View 1 is moved a little, the others more; colors but white are jittered in all but view 0.
    """
    generator = Generator().manual_seed(seed)
    count = len(sprites.pixels_NHW4)
    shape = (count, len(COLORS), views, tower.config.positions, tower.config.depth)
    codes = torch.zeros(shape, dtype=torch.int16)
    for view in range(views):
        for k in range(len(COLORS)):
            for start in range(0, count, CHUNK):
                stored = sprites_to_float(sprites.pixels_NHW4[start : start + CHUNK])
                pictures = _pictures(stored, k, view, generator, size)
                found = tower.encode(pictures).codes_BhwD.flatten(1, 2)
                codes[start : start + CHUNK, k, view] = found.to(torch.int16)
    return CodedViews(codes_NKVTD=codes)


def _pictures(stored: Tensor, k: int, view: int, generator: Generator, size: int) -> Tensor:
    color_B = torch.full((len(stored),), k)
    if view == 0:
        return composite(shrink(stored, size), palette_colors(color_B))
    if view == 1:
        moved = augment(stored, generator, scale=(0.85, 1.0), shift=0.05, flip=0.15, untouched=0.0)
    else:
        moved = augment(stored, generator, untouched=0.0)
    return composite(shrink(moved, size), palette_colors(color_B, generator))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which sprite shows what, and what the language model may see."""

    sprite_of: dict[tuple[int, int], int]  # (concept, style)
    seen: tuple[Shown, ...]
    held_out_color: tuple[Shown, ...]  # the composition is new, its parts are not
    held_out_style: tuple[Shown, ...]  # the concept was never seen in this style

    @classmethod
    def of(cls, sprites: SpriteSet) -> "Splits":
        """Split all (concept, style, color)."""
        pairs = list(zip(sprites.concept_of_N.tolist(), sprites.style_of_N.tolist(), strict=True))
        sprite_of = {pair: n for n, pair in enumerate(pairs)}
        shown_NK = shown_compositions(sprites)
        styles_of: dict[int, list[int]] = {}
        for concept, style in pairs:
            styles_of.setdefault(concept, []).append(style)
        parts: dict[str, list[Shown]] = {"seen": [], "color": [], "style": []}
        for n, (concept, style) in enumerate(pairs):
            unseen = unseen_style(sprites.concepts[concept], style, sorted(styles_of[concept]))
            for k in range(len(COLORS)):
                name = "style" if unseen else "seen" if shown_NK[n, k] else "color"
                parts[name].append(Shown(concept, style, k))
        return cls(
            sprite_of=sprite_of,
            seen=tuple(parts["seen"]),
            held_out_color=tuple(parts["color"]),
            held_out_style=tuple(parts["style"]),
        )


class Lessons:
    """Draws lessons as spliced rows."""

    def __init__(
        self,
        sprites: SpriteSet,
        codes: CodedViews,
        tokenizer: Tokenizer,
        config: VilaUConfig,
        rng: random.Random,
    ) -> None:
        self.concepts, self.codes, self.tokenizer = sprites.concepts, codes, tokenizer
        self.config, self.rng = config, rng
        self.splits = Splits.of(sprites)
        self.allowed = frozenset(self.splits.seen)
        self.styles = sorted(set(sprites.style_of_N.tolist()))
        self.questions = Questions(sprites.concepts, self.styles, rng)

    def draw(self, tokens: int, *, exact_share: float = 0.0) -> list[Row]:
        """Lessons of together at least ``tokens`` tokens.

        Args:
            tokens: in all rows.
            exact_share: share of captions that leave nothing open: name, style and color.
        """
        rows: list[Row] = []
        lessons: tuple[Callable[[], Row], ...] = (
            self._see,
            lambda: self._draw(exact_share),
            self._change,
            self._talk,
        )
        while sum(map(len, rows)) < tokens:
            (lesson,) = self.rng.choices(lessons, (SEE, DRAW, CHANGE, TALK))
            rows.append(lesson())
        return rows

    def picture(self, shown: Shown, *, answer: bool = False, view: int | None = None) -> Picture:
        """A picture in the given view, or in a random one."""
        if view is None:
            plain = answer and self.rng.random() < PLAIN_VIEW
            view = 0 if plain else self.rng.randrange(2 if answer else VIEWS)
        sprite = self.splits.sprite_of[shown.concept, shown.style]
        return Picture(codes_ND=self.codes.codes_NKVTD[sprite, shown.color, view], answer=answer)

    def row(self, turns: Sequence[Turn], pictures: Sequence[Picture]) -> Row:
        """A conversation as one stream; what the assistant says or shows is the target."""
        ids, labels = training_ids(self.tokenizer, self.config.template, turns)
        return splice(
            ids,
            pictures,
            depth=self.config.depth.depth,
            vocabulary=self.config.vocabulary,
            labels=labels,
        )

    def _see(self) -> Row:
        shown = self.rng.choice(self.splits.seen)
        if self.rng.random() < CLAIMS:
            turns = self.questions.claims(shown, CLAIM_TURNS)
        else:
            turns = self.questions.about(shown, self.rng.choice(TURNS))
        return self.row(turns, [self.picture(shown)])

    def _draw(self, exact_share: float) -> Row:
        text, shown = self._exact() if self.rng.random() < exact_share else self._typed()
        if self.rng.random() < UNCONDITIONAL:
            text = ""
        return self.row([*picture_prompt(text), _shows()], [self.picture(shown, answer=True)])

    def _change(self) -> Row:
        while True:
            shown = self.rng.choice(self.splits.seen)
            if self.rng.random() < 0.6:
                changed = replace(shown, color=self.rng.randrange(len(COLORS)))
            else:
                changed = replace(shown, style=self.rng.choice(self.styles))
            if changed != shown and changed in self.allowed:
                break
        turns = [*picture_prompt(self.questions.change(shown, changed)), _shows()]
        return self.row(
            turns, [self.picture(shown, view=0), self.picture(changed, answer=True, view=0)]
        )

    def _talk(self) -> Row:
        question, answer = self.questions.text_only()
        turns = [Turn(role="user", text=question), Turn(role="assistant", text=answer)]
        return self.row(turns, [])

    def _exact(self) -> tuple[str, Shown]:
        shown = self.rng.choice(self.splits.seen)
        return describe(self.concepts, shown, MAIN), shown

    def _typed(self) -> tuple[str, Shown]:
        """A caption of the grammar that has an answer the model may see."""
        while True:
            record = draw_record(self.concepts, self.rng.randrange(len(self.concepts)), self.rng)
            styles = self.styles if record.style == ANY_STYLE else [record.style]
            fitting = [Shown(record.concept, style, record.color) for style in styles]
            fitting = [shown for shown in fitting if shown in self.allowed]
            if fitting:
                return record.text, self.rng.choice(fitting)


def tokenizer_texts(sprites: SpriteSet, styles: Sequence[int], count: int = 40_000) -> list[str]:
    """What the tokenizer learns from: captions, and conversations with the names of their sides."""
    rng = random.Random(1)
    questions = Questions(sprites.concepts, styles, rng)
    texts: list[str] = []
    for number in range(count):
        concept = number % len(sprites.concepts)
        shown = Shown(concept, rng.choice(styles), rng.randrange(len(COLORS)))
        texts.append(f"USER: {draw_record(sprites.concepts, concept, rng).text} ASSISTANT: ")
        for turn in [*questions.about(shown, max(TURNS)), *questions.claims(shown, 1)]:
            texts.append(f"{'USER' if turn.role == 'user' else ' ASSISTANT'}: {turn.text}")
        if number % 5 == 0:
            texts += [f"USER: {questions.change(shown, shown)}", *questions.text_only()]
    return texts


def _shows() -> Turn:
    return Turn(role="assistant", text=f"<im_start>{PLACEHOLDER}<im_end>")
