"""A picture on its way: all that its next denoising step needs, in one immutable value."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gesso_core.lora.stack import LoraStack, StackKey
from gesso_core.models.sana import TextContext
from gesso_core.pipelines.recipe import Guidance, Recipe
from gesso_core.pipelines.step_batcher import Failure
from gesso_core.sampling import Sampler, SamplerState


class GroupKey(NamedTuple):
    """What drafts must have in common to share a forward of the network."""

    latent_shape: tuple[int, int, int]
    guidance: Guidance
    loras: StackKey = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """The state of one picture between two steps.

    ``text`` holds one text, or the negative and the positive one under classifier-free guidance.
    ``noise_TCHW`` is what a stochastic sampler will use up, one tensor per step, drawn at the
    start so that a repeated step repeats its noise. ``denoised_CHW`` is the latent that the last
    step expected at the end, and ``finite`` whether that step gave finite numbers. ``loras`` are
    the adapters that the picture began with, whatever happens to their files.
    """

    recipe: Recipe
    text: TextContext
    sampler: Sampler
    state: SamplerState
    noise_TCHW: Tensor | None = None
    denoised_CHW: Tensor | None = None
    finite: bool = True
    loras: LoraStack | None = None

    @property
    def group(self) -> GroupKey:
        """Drafts of one model with equal groups can share a forward."""
        loras = () if self.loras is None else self.loras.key
        return GroupKey(self.recipe.latent_shape, self.recipe.guidance, loras)

    @property
    def track(self) -> None:
        """The group is the same at every step."""
        return None

    @property
    def cost(self) -> int:
        """Pixels of the picture as the model draws it."""
        return self.recipe.pixels

    @property
    def steps_done(self) -> int:
        """Completed steps."""
        return self.state.index

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.state.done

    @property
    def result(self) -> Tensor:
        """The final latent (C, h, w), in the scale of the diffusion model."""
        return self.state.result

    def describe_failure(self, failure: Failure) -> str:
        """What a person can do about a step that failed."""
        recipe = self.recipe
        if failure == "out of memory":
            height, width = recipe.model_size
            return (
                f"one denoising step at {width}x{height} does not fit into memory even alone; "
                "ask for a smaller size or a smaller model"
            )
        return (
            f"the latent became NaN or infinite at step {self.steps_done} of {recipe.steps} "
            f"({recipe.sampler}); try another seed or a lower guidance scale, and check that the "
            "weights run in the precision they were made for"
        )
