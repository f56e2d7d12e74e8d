"""Pictures, videos and answers on their way through a VILA-U, each one immutable value."""

# T visual tokens of all frames   D codes of a visual token   S width of the states
# P side of a picture as the tower sees it

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gesso_core.models.vila_u.rows import RowCache
from gesso_core.models.vila_u.splice import Row
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.step_batcher import Failure

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Video:
    """Frames (F, H, W, 3), uint8 RGB."""

    frames_FHW3: NDArray[np.uint8]


Part = str | Pixels | Video


@dataclass(frozen=True, kw_only=True, eq=False)
class Utterance:
    """What one side says and shows, in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How an answer is drawn; at temperature 0 the likeliest token is taken each time."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DrawRecipe:
    """A request for a picture or a video with every choice made.

    A picture is drawn at ``model_size`` (height, width); ``latent_shape`` is (C, h, w). A step is
    one row of the grid, over all frames. ``keep`` rows are taken from a given picture.
    """

    model: str
    prompt: str
    width: int
    height: int
    model_size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    seed: int
    steps: int
    guidance_scale: float
    top_k: int
    top_p: float
    keep: int | None = None
    frames: int = 1
    video: bool = False
    sampler: str = "next-token"

    @property
    def pixels(self) -> int:
        """Pixels of all frames as the model draws them."""
        return self.model_size[0] * self.model_size[1] * self.frames

    @property
    def guided(self) -> bool:
        """Whether an unconditional row is drawn along."""
        return self.guidance_scale != 1.0


class Prompt(NamedTuple):
    """Token ids with places for pictures, and the pictures as the tower sees them, (3, P, P)."""

    ids: tuple[int, ...]
    signals: tuple[Tensor, ...] = ()


class Stream(NamedTuple):
    """One row of the language model: its memory, how much of it is filled, its newest state."""

    cache: RowCache
    length: int
    state_S: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawDraft:
    """A picture or a video between two rows of its grid.

    ``prompt`` is what is to be fed before the first row is drawn; then there are ``streams``: the
    conditional one and, under guidance, the unconditional one. ``codes_TD`` has all codes, -1 where
    none was drawn yet, ``uniforms_TD`` all random numbers from the start, so that a repeated step
    repeats its draws.
    """

    recipe: DrawRecipe
    prompt: Row
    codes_TD: Tensor
    uniforms_TD: Tensor
    rows_done: int
    streams: tuple[Stream, ...] = ()
    finite: bool = True

    @property
    def group(self) -> str:
        """All drafts of one model share its forward, whatever their prompts and rows."""
        return "draw"

    @property
    def track(self) -> None:
        """The group is the same at every step."""
        return None

    @property
    def cost(self) -> int:
        """Pixels of one frame: what a step works on."""
        height, width = self.recipe.model_size
        return height * width

    @property
    def steps_done(self) -> int:
        """Rows of the grid that are drawn, kept ones included."""
        return self.rows_done

    @property
    def total_steps(self) -> int:
        """Rows of all frames."""
        return self.recipe.steps

    @property
    def done(self) -> bool:
        """Whether every code is drawn."""
        return self.rows_done >= self.recipe.steps

    def describe_failure(self, failure: Failure) -> str:
        """What a person can do about a step that failed."""
        if failure == "out of memory" and not self.streams:
            return (
                "this prompt does not fit into memory even alone; "
                "shorten it, or use a smaller model"
            )
        if failure == "out of memory":
            return (
                "one row of this picture does not fit into memory even alone; "
                "ask for fewer frames, a shorter prompt or a smaller model"
            )
        return (
            f"the states became NaN or infinite at row {self.rows_done} of {self.total_steps}; "
            "check that the weights run in the precision they were made for"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerDraft:
    """An answer between two steps of a few tokens; ``text`` is what can be shown of it so far.

    ``prompt`` is what is to be fed before the first word; then it is gone, and there is a
    ``stream``.
    """

    options: AnswerOptions
    prompt: Prompt | None
    uniforms_M: Tensor
    prompt_tokens: int
    stream: Stream | None = None
    ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    pixels: int = 1
    finite: bool = True

    @property
    def group(self) -> str:
        """All answers of one model share its forward."""
        return "answer"

    @property
    def track(self) -> None:
        """The group is the same at every step."""
        return None

    @property
    def cost(self) -> int:
        """As much as one frame of a picture of this model."""
        return self.pixels

    @property
    def steps_done(self) -> int:
        """Tokens so far."""
        return len(self.ids)

    @property
    def total_steps(self) -> int:
        """Tokens at most."""
        return self.options.max_tokens

    @property
    def answer_tokens(self) -> int:
        """Tokens that were drawn, the one that ends the answer included."""
        return len(self.ids)

    @property
    def done(self) -> bool:
        """Whether the answer is complete, or as long as it may be."""
        return self.finish_reason is not None

    def describe_failure(self, failure: Failure) -> str:
        """What a person can do about a step that failed."""
        if failure == "out of memory":
            return "this conversation does not fit into memory even alone; send a shorter one"
        return (
            f"the states became NaN or infinite at token {len(self.ids)}; "
            "check that the weights run in the precision they were made for"
        )


def all_finite(states: Sequence[Tensor]) -> bool:
    """Whether no number of any of these is NaN or infinite."""
    return bool(torch.stack(list(states)).isfinite().all())
