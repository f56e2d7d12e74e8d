"""A picture on its way through a HART: all that its next scale needs, in one immutable value."""

# L text slots   N tokens of a scale   C latent channels   h, w latent height and width

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gesso_core.layers.kv_cache import KVRows
from gesso_core.models.hart.generation import DrawOptions
from gesso_core.models.hart.transformer import HARTText
from gesso_core.pipelines.step_batcher import Failure

CacheRow = tuple[KVRows, int]  # a row of a cache that other drafts may share


@dataclass(frozen=True, kw_only=True)
class HartRecipe:
    """A request with every choice made.

    The picture is drawn at ``model_size`` (height, width) and brought to ``height`` x ``width``
    afterwards; ``latent_shape`` is (C, h, w). A step is one scale. ``keep`` scales are taken from a
    given picture; None leaves the number to the pipeline when there is one.
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
    options: DrawOptions
    keep: int | None = None
    sampler: str = "next-scale"

    @property
    def pixels(self) -> int:
        """Pixels of the picture as the model draws it."""
        return self.model_size[0] * self.model_size[1]

    @property
    def top_k(self) -> int | None:
        """Codes that each draw chooses from; None is the model's own number for every scale."""
        return self.options.top_k

    @property
    def top_p(self) -> float:
        """Share of the probability that each draw chooses from; 0 is all of it."""
        return self.options.top_p

    @property
    def guided(self) -> bool:
        """Whether a row without text is drawn along."""
        return self.guidance_scale != 0.0


class HartGroup(NamedTuple):
    """What drafts must have in common to share a step."""

    scale: int
    guided: bool
    options: DrawOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class HartDraft:
    """The state of one picture between two scales.

    ``rows`` are the keys and values of all slots so far, with text and, under guidance, without;
    there are none before the first scale. ``indices`` are the codes of the scales that are drawn,
    ``kept`` those of the first scales of a given picture, which are taken instead of drawn ones.
    ``latent_CHW`` is the running sum in the scale of the tokenizer.
    """

    recipe: HartRecipe
    text: HARTText
    latent_CHW: Tensor
    rows: tuple[CacheRow, ...] = ()
    indices: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()
    finite: bool = True

    @property
    def group(self) -> HartGroup:
        """Drafts at one scale share a forward, whatever their seeds and strengths of guidance."""
        return HartGroup(self.steps_done, self.recipe.guided, self.recipe.options)

    @property
    def track(self) -> tuple[bool, DrawOptions]:
        """A picture that came later shares a forward once it has reached the same scale."""
        return self.recipe.guided, self.recipe.options

    @property
    def cost(self) -> int:
        """Pixels of the picture as the model draws it."""
        return self.recipe.pixels

    @property
    def steps_done(self) -> int:
        """Completed scales."""
        return len(self.indices)

    @property
    def total_steps(self) -> int:
        """Scales of a picture."""
        return self.recipe.steps

    @property
    def done(self) -> bool:
        """Whether no scale is left."""
        return self.steps_done >= self.total_steps

    def describe_failure(self, failure: Failure) -> str:
        """What a person can do about a step that failed."""
        if failure == "out of memory":
            height, width = self.recipe.model_size
            return (
                f"one scale of a picture of {width}x{height} does not fit into memory even alone; "
                "use a smaller model, or guidance_scale 0, which needs half of the memory"
            )
        return (
            f"the latent became NaN or infinite at scale {self.steps_done} of {self.total_steps}; "
            "try another seed or a lower guidance scale, and check that the weights run in the "
            "precision they were made for"
        )
