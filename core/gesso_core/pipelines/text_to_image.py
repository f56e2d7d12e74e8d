"""Text to image: a denoiser and the autoencoder that paints its latents.

    pipeline = TextToImage.load("sana-tiny")
    picture, = pipeline(GenerationRequest(prompt="a red apple", width=64, height=64, seed=7))

Many requests in one call share their denoising steps where their sizes allow it; a picture is the
same alone or among others (see `step_batcher`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from gesso_core.hub import DEFAULT_STORE
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.load import load_denoiser, load_its_autoencoder
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.provenance import Provenance, provenance_of
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher, Ticket


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture and what made it."""

    pixels_HWC: Pixels
    seed: int
    provenance: Provenance


@dataclass(frozen=True)
class PictureStep:
    """A step of one of the pictures of a call, as ``on_step`` sees it.

    ``request`` is the number of the picture; ``step`` counts from 1 to ``total``. What ``on_step``
    raises ends the call; `Cancelled` is made for that.
    """

    request: int
    index: int
    total: int
    preview: Callable[[], Pixels]


class TextToImage:
    """Prompt in, picture out."""

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder) -> None:
        self.denoiser = denoiser
        self.autoencoder = autoencoder

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        store: Path = DEFAULT_STORE,
        lora_folder: Path | None = None,
    ) -> Self:
        """A model by its registry name, or from a pipeline folder.

        ``dtype`` of the denoiser: by default what it was trained for on a GPU, float32 on a CPU.
        ``lora_folder`` has the files that a request may name in ``loras``.
        """
        denoiser = load_denoiser(
            name_or_folder, dtype=dtype, device=device, store=store, lora_folder=lora_folder
        )
        return cls(denoiser, load_its_autoencoder(name_or_folder, device=device, store=store))

    def __call__(
        self,
        *requests: GenerationRequest,
        on_step: Callable[[PictureStep], None] | None = None,
        max_batch_pixels: int = 4 * 1024 * 1024,
    ) -> list[Picture]:
        """The pictures of all requests, in their order.

        Raises InvalidRequest before anything is drawn, and the first error of any picture.
        """
        recipes = [self.denoiser.recipe(request) for request in requests]
        batcher = StepBatcher(max_batch_pixels=max_batch_pixels)
        tickets = [
            batcher.add(self.denoiser, self.denoiser.begin(recipe), on_step=self._told(n, on_step))
            for n, recipe in enumerate(recipes)
        ]
        while batcher.step():
            _raise_failure(tickets)
        return [self._picture(ticket.outcome.result()) for ticket in tickets]

    def paint(self, draft: Draft) -> Pixels:
        """What the network expects this draft to become, at the size that was asked for."""
        assert draft.denoised_CHW is not None
        latent = draft.result if draft.done else draft.denoised_CHW
        recipe = draft.recipe
        return self.autoencoder.decode(
            self.denoiser.unscaled(latent), height=recipe.height, width=recipe.width
        )

    def _told(
        self, request: int, tell: Callable[[PictureStep], None] | None
    ) -> Callable[[Draft], None] | None:
        if tell is None:
            return None
        return lambda draft: tell(
            PictureStep(request, draft.steps_done, draft.recipe.steps, lambda: self.paint(draft))
        )

    def _picture(self, draft: Draft) -> Picture:
        return Picture(
            pixels_HWC=self.paint(draft),
            seed=draft.recipe.seed,
            provenance=provenance_of(self.denoiser, draft),
        )


def _raise_failure(tickets: Sequence[Ticket[Draft]]) -> None:
    for ticket in tickets:
        if ticket.outcome.done():
            ticket.outcome.result()
