"""HART as a pipeline: prompt to latent, one scale per step.

Drafts go in and drafts one scale further come out; nothing of them is kept in here. Pictures with
different prompts, seeds and strengths of guidance share a forward, and each gets the same codes as
it would alone. What stands for "no text" in guidance is the same for all: its slots are run once
for the whole life of the pipeline.
"""

# B drafts   C latent channels   h, w latent height and width

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.layers.kv_cache import KVRows
from gesso_core.models.hart.generation import (
    ScaleInput,
    ScaleResult,
    draw_scale,
    empty_cache,
)
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.scale_noise import SeededNoise
from gesso_core.models.hart.transformer import HART, HARTText
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.hart_draft import HartDraft, HartRecipe
from gesso_core.pipelines.hart_recipe import HartDefaults, checked_keep, hart_recipe
from gesso_core.pipelines.memory import explained
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.registry import ModelEntry
from gesso_core.text import TextEncoder
from gesso_core.text.cache import CachedEncoder
from gesso_core.text.domain import Domain, Verdict


class CountingEncoder(TextEncoder, Protocol):
    """A text encoder that tells how long a prompt is."""

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, uncut."""
        ...


class HartPipeline:
    """All of text to image but the decoder.

    ``scaling_factor`` turns latents of the autoencoder named by ``autoencoder`` into those that
    are quantized; ``compression`` is its number of pixels per side of a latent cell.
    """

    def __init__(
        self,
        *,
        entry: ModelEntry,
        model: HART,
        quantizer: MultiScaleQuantizer,
        text_encoder: CountingEncoder,
        identity: Identity,
        compression: int,
        scaling_factor: float = 1.0,
        domain: Domain | None = None,
        defaults: HartDefaults | None = None,
    ) -> None:
        self.entry, self.identity, self.domain = entry, identity, domain
        self.model, self.quantizer = model, quantizer
        self.text_encoder = CachedEncoder(text_encoder)
        self.compression, self.scaling_factor = compression, scaling_factor
        self.defaults = defaults or HartDefaults()
        self._count = text_encoder.token_ids
        self._no_text: tuple[HARTText, KVRows] | None = None
        self._lock = threading.Lock()

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder that decodes the latents."""
        return self.entry.autoencoder or self.entry.name

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the network; latents and codes stay in fp32."""
        return self.model.dtype

    def recipe(self, request: GenerationRequest) -> HartRecipe:
        """Every choice of a request made; InvalidRequest names the field that cannot be."""
        return hart_recipe(
            request,
            self.entry,
            self.model.config,
            size=self.model.config.side * self.compression,
            prompt_tokens=len(self._count([request.prompt])[0]),
            defaults=self.defaults,
        )

    def kv_bytes(self, recipe: HartRecipe) -> int:
        """Bytes of the keys and values of one picture when it is finished."""
        rows = 2 if recipe.guided else 1
        return rows * self.model.config.cache_bytes(self.dtype.itemsize)

    @torch.inference_mode()
    def begin(self, recipe: HartRecipe, start: Tensor | None = None) -> HartDraft:
        """Encode the text, and read the codes of a picture to go on from.

        Args:
            recipe: with ``keep`` = k, the first k scales of ``start`` stay as they are and the rest
                is drawn; half of the scales when it does not say.
            start: latent (C, h, w) of a picture, in the scale of the autoencoder, or none.

        Raises:
            InvalidRequest: a latent of another size, or something to keep and no picture.
        """
        kept = self._kept(recipe, start)
        with explained("encoding the prompt", "use a smaller model, or another device for it"):
            states = self.text_encoder.encode([recipe.prompt])
            text = self.model.encode_text(
                states.states_BLC.to(self.device), states.mask_BL.to(self.device)
            )
            if recipe.guided:
                self._without_text()
        latent_CHW = torch.zeros(recipe.latent_shape, device=self.device)
        return HartDraft(recipe=recipe, text=text, latent_CHW=latent_CHW, kept=kept)

    @torch.inference_mode()
    def advance(self, drafts: Sequence[HartDraft]) -> list[HartDraft]:
        """One scale of every draft, in one forward. All must be of one `HartDraft.group`."""
        scale, guided, options = drafts[0].group
        # At the first scale guidance has no strength yet, and the rows without text are known.
        guided = guided and scale > 0
        texts, cache = self._rows(drafts, scale, guided)
        given = ScaleInput(
            scale=scale,
            text=texts,
            latent_BCHW=torch.stack([draft.latent_CHW for draft in drafts]),
            cache=cache,
            guidance_B=torch.tensor(
                [draft.recipe.guidance_scale for draft in drafts], device=self.device
            ),
            noises=[SeededNoise(draft.recipe.seed, scale) for draft in drafts],
            kept=[draft.kept[scale] if scale < len(draft.kept) else None for draft in drafts],
        )
        result = draw_scale(self.model, self.quantizer, given, options)
        return [_moved(draft, result, number, len(drafts)) for number, draft in enumerate(drafts)]

    def latent(self, draft: HartDraft) -> Tensor:
        """The sum of all scales so far (C, h, w), in the scale of the autoencoder."""
        return draft.latent_CHW / self.scaling_factor

    def judge(self, prompt: str) -> Verdict:
        """Whether the model knows what a prompt is about, as far as it can tell."""
        return Verdict(None) if self.domain is None else self.domain.judge([prompt])[0]

    def _rows(
        self, drafts: Sequence[HartDraft], scale: int, guided: bool
    ) -> tuple[HARTText, KVRows]:
        """Texts and caches: a row with text of every draft, then one without of every draft."""
        texts = [draft.text for draft in drafts]
        if scale == 0:
            return HARTText.concatenate(texts), empty_cache(self.model, len(drafts))
        members = [draft.rows[0] for draft in drafts]
        if guided:
            no_text, prefix = self._without_text()
            texts.append(no_text.rows([0] * len(drafts)))
            members += [draft.rows[1] if scale > 1 else (prefix, 0) for draft in drafts]
        cache = KVRows.gather(members, capacity=self.model.config.slots)
        return HARTText.concatenate(texts), cache

    def _without_text(self) -> tuple[HARTText, KVRows]:
        """The empty text, and the keys and values of its slots."""
        with self._lock:
            if self._no_text is None:
                text = self.model.no_text()
                slots, angles = self.model.text_slots(text), self.model.angles(text, 0)
                cache = empty_cache(self.model, 1)
                _, filled = self.model.run(slots, angles, text, cache=cache)
                assert filled is not None
                self._no_text = text, filled
            return self._no_text

    def _kept(self, recipe: HartRecipe, start: Tensor | None) -> tuple[Tensor, ...]:
        if start is None:
            if recipe.keep:
                raise InvalidRequest(
                    f"keep {recipe.keep} scales of which picture? give one, or leave keep out",
                    field="keep",
                )
            return ()
        if tuple(start.shape) != recipe.latent_shape:
            height, width = recipe.model_size
            raise InvalidRequest(
                f"a latent of shape {tuple(start.shape)} to go on from; {self.entry.name} needs "
                f"{recipe.latent_shape}: give a picture of {width}x{height} pixels",
                field="image",
            )
        keep = checked_keep(recipe.keep, self.model.config)
        if keep is None:
            keep = len(self.model.config.scales) // 2
        codes = self.quantizer.encode_hybrid(start[None].to(self.device) * self.scaling_factor)
        return tuple(indices_1N[0] for indices_1N in codes.indices[:keep])


def _moved(draft: HartDraft, result: ScaleResult, number: int, batch: int) -> HartDraft:
    """One draft after a step in which it was number ``number``."""
    assert result.cache is not None
    rows = [(result.cache, place) for place in range(number, result.cache.rows, batch)]
    latent_CHW = result.latent_BCHW[number]
    return replace(
        draft,
        latent_CHW=latent_CHW,
        rows=tuple(rows),
        indices=(*draft.indices, result.indices_BN[number]),
        finite=bool(latent_CHW.isfinite().all()),
    )
