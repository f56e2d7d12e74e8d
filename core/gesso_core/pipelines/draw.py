"""Pictures by a model that draws tokens, HART or VILA-U, and the autoencoder that decodes them.

    draw = DrawPicture.load("hart-tiny")
    picture, = draw(GenerationRequest(prompt="a red apple", width=64, height=64, seed=7))

Many requests in one call share their steps (a scale, or a row, of every picture at a time); a
picture is the same alone or among others.
"""

# C latent channels   h, w latent grid   H, W pixels

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gesso_core.hub import DEFAULT_STORE
from gesso_core.hub.load_hart_tokenizer import hart_tokenizer_folder
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.pictures import Pixels, covering
from gesso_core.pipelines.provenance import Provenance, provenance
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher, Ticket
from gesso_core.pipelines.text_to_image import Picture, PictureStep
from gesso_core.registry import Family, ModelEntry, find
from gesso_core.text.domain import Domain, Verdict


class Draws(Protocol):
    """What the pipelines of both families can do; recipes, drafts and starts are their own."""

    entry: ModelEntry
    identity: Identity
    domain: Domain | None

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder that decodes its latents."""
        ...

    def recipe(self, request: GenerationRequest) -> Any:
        """Every choice of a request made; InvalidRequest names the field that cannot be."""
        ...

    def begin(self, recipe: Any, start: Any = None, /) -> Any:
        """The draft of a picture, with or without one to start from."""
        ...

    def advance(self, drafts: Sequence[Any]) -> list[Any]:
        """Every draft one step further."""
        ...

    def latent(self, draft: Any) -> Tensor:
        """The latent (C, h, w) as far as it is drawn, in the scale of the autoencoder."""
        ...


def family_of(name_or_folder: str | Path) -> Family:
    """Which family draws: that of the registry's entry, or what the folder looks like."""
    if not isinstance(name_or_folder, Path):
        return find(name_or_folder).family
    if (name_or_folder / "vision_tower").is_dir():
        return "vila-u"
    return "sana" if hart_tokenizer_folder(name_or_folder) is None else "hart"


def made_by(model: Draws, recipe: Any) -> Provenance:
    """What a picture after ``recipe`` is made by."""
    domain = model.domain
    verdict = Verdict(None) if domain is None else domain.judge([recipe.prompt])[0]
    return provenance(
        recipe,
        model.identity,
        verdict,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        keep=recipe.keep,
    )


class DrawPicture:
    """Prompt in, picture out; a picture may go in with it."""

    def __init__(self, model: Draws, autoencoder: Autoencoder) -> None:
        self.model = model
        self.autoencoder = autoencoder

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        store: Path = DEFAULT_STORE,
    ) -> Self:
        """A model by its registry name, or from a folder.

        ``dtype``: by default what it was trained for on a GPU, float32 on a CPU.
        """
        model = _load(name_or_folder, dtype, device, store)
        own = isinstance(name_or_folder, Path) and model.autoencoder == model.entry.name
        tokenizer = name_or_folder if own else model.autoencoder
        return cls(model, Autoencoder.load(tokenizer, device=device, store=store))

    @property
    def sees(self) -> bool:
        """Does the model look at a picture itself, not only at its latent?"""
        return "image-to-text" in self.model.entry.tasks

    def __call__(
        self,
        *requests: GenerationRequest,
        image: Pixels | None = None,
        on_step: Callable[[PictureStep], None] | None = None,
        max_batch_pixels: int = 4 * 1024 * 1024,
    ) -> list[Picture]:
        """The pictures of all requests, in their order.

        With ``image`` each begins from it: its first ``keep`` scales or rows stay, and without
        ``keep`` a model that sees looks at it and draws anew. Raises InvalidRequest before anything
        is drawn, and the first error of any picture.
        """
        recipes = [self.model.recipe(request) for request in requests]
        batcher = StepBatcher(max_batch_pixels=max_batch_pixels)
        tickets: list[Ticket[Any]] = [
            batcher.add(self.model, self._begin(recipe, image), on_step=self._told(n, on_step))
            for n, recipe in enumerate(recipes)
        ]
        while batcher.step():
            for ticket in tickets:
                if ticket.outcome.done():
                    ticket.outcome.result()
        return [self._picture(ticket.outcome.result()) for ticket in tickets]

    def paint(self, draft: Any) -> Pixels:
        """What is drawn so far, at the size that was asked for."""
        recipe = draft.recipe
        latent_CHW = self.model.latent(draft)
        return self.autoencoder.decode(latent_CHW, height=recipe.height, width=recipe.width)

    def _begin(self, recipe: Any, image: Pixels | None) -> Any:
        if image is None:
            return self.model.begin(recipe)
        if self.sees:
            return self.model.begin(recipe, image)
        fitted = covering(image, *recipe.model_size)
        return self.model.begin(recipe, self.autoencoder.encode(fitted))

    def _told(
        self, request: int, tell: Callable[[PictureStep], None] | None
    ) -> Callable[[Any], None] | None:
        if tell is None:
            return None
        return lambda draft: tell(
            PictureStep(request, draft.steps_done, draft.total_steps, lambda: self.paint(draft))
        )

    def _picture(self, draft: Any) -> Picture:
        return Picture(
            pixels_HWC=self.paint(draft),
            seed=draft.recipe.seed,
            provenance=made_by(self.model, draft.recipe),
        )


def _load(name_or_folder: str | Path, dtype: torch.dtype | None, device: str, store: Path) -> Draws:
    if family_of(name_or_folder) == "hart":
        from gesso_core.pipelines.hart_load import load_hart

        return load_hart(name_or_folder, dtype=dtype, device=device, store=store)
    from gesso_core.pipelines.vila_u_load import load_vila_u

    return load_vila_u(name_or_folder, dtype=dtype, device=device, store=store)
