"""Prompt to latent, step by step: a Sana, its text encoder, and the arithmetic of one shared step.

A `Draft` goes in and a `Draft` one step further comes out; nothing is kept in here. So drafts may
stand at different steps of different samplers and still share one forward of the network.
"""

# B rows of the network   C channels   T draws of noise

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.layers.adapters import adapters
from gesso_core.lora.library import LoraLibrary
from gesso_core.lora.stack import LoraStack
from gesso_core.lora.targets import LayerMap
from gesso_core.models.keys.sana import SANA_ORIGINAL, sana_diffusers_keys
from gesso_core.models.sana import Sana, TextContext
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.graphed import GraphedSana
from gesso_core.pipelines.memory import explained
from gesso_core.pipelines.recipe import Canvas, GenerationRequest, Recipe, make_recipe
from gesso_core.registry import ModelEntry
from gesso_core.sampling import make_sampler
from gesso_core.sampling.guidance import classifier_free
from gesso_core.sampling.noise import noise_stream
from gesso_core.text import TextEncoder, TextStates
from gesso_core.text.domain import Domain, Verdict


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which weights these are, and what they take.

    ``quantization`` names format, rank and mode of quantized weights: ``svdquant-int4-r32
    (dequantized)``. ``weight_bytes`` are in memory, not on disk.
    """

    revision: str
    weights_sha256: str
    quantization: str = "none"
    weight_bytes: int = 0


class Denoiser:
    """All of text to image but the autoencoder.

    ``canvas`` and ``scaling_factor`` describe the autoencoder whose latents the model draws;
    ``lora_folder`` has the LoRAs that a request may name; ``cuda_graphs`` replays the network on a
    GPU instead of launching it, where no LoRA is on.
    """

    def __init__(
        self,
        *,
        entry: ModelEntry,
        model: Sana,
        text_encoder: TextEncoder,
        canvas: Canvas,
        scaling_factor: float,
        identity: Identity,
        domain: Domain | None = None,
        lora_folder: Path | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.entry = entry
        self.model = model
        self.text_encoder = text_encoder
        self.canvas = canvas
        self.scaling_factor = scaling_factor
        self.identity = identity
        self.domain = domain
        self.loras = None if lora_folder is None else _library(lora_folder, model)
        self.graphed = GraphedSana(model) if cuda_graphs and self.device.type == "cuda" else None

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder that decodes the latents; a folder brings its own."""
        return self.entry.autoencoder or self.entry.name

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.model.patch.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the network; latents stay in fp32 between its forwards."""
        return self.model.patch.weight.dtype

    def recipe(self, request: GenerationRequest) -> Recipe:
        """Every choice of a request made; InvalidRequest names the field that cannot be."""
        guided_inside = self.model.config.guidance_embedding
        recipe = make_recipe(request, self.entry, self.canvas, guidance_embedding=guided_inside)
        if recipe.loras:
            self._library().require(recipe.loras)
        return recipe

    @torch.inference_mode()
    def begin(self, recipe: Recipe) -> Draft:
        """Encode the text, once for all steps, read the LoRAs, and draw the noise."""
        sampler = make_sampler(recipe.sampler, self.entry.shift)
        draws = noise_stream(recipe.seed, recipe.latent_shape)
        state = sampler.start(next(draws).to(self.device), recipe.steps)
        noise_TCHW = None
        if sampler.stochastic:
            noise_TCHW = torch.stack(list(islice(draws, recipe.steps))).to(self.device)
        loras = self._adapters(recipe)
        with adapters(loras):
            text = self._encode_text(recipe)
        return Draft(
            recipe=recipe,
            text=text,
            sampler=sampler,
            state=state,
            noise_TCHW=noise_TCHW,
            loras=loras,
        )

    @torch.inference_mode()
    def advance(self, drafts: Sequence[Draft]) -> list[Draft]:
        """One denoising step of every draft, in one forward. All must be of one `Draft.group`."""
        with adapters(drafts[0].loras):  # those of all: they are part of the group
            velocities = self._velocities(drafts)
        moved = [
            _moved(draft, velocity) for draft, velocity in zip(drafts, velocities, strict=True)
        ]
        latents_BCHW = torch.stack([draft.state.latent for draft in moved])
        finite = latents_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        return [replace(draft, finite=ok) for draft, ok in zip(moved, finite, strict=True)]

    def judge(self, prompt: str) -> Verdict:
        """Whether the model knows what a prompt is about, as far as it can tell."""
        return Verdict(None) if self.domain is None else self.domain.judge([prompt])[0]

    def unscaled(self, latent_CHW: Tensor) -> Tensor:
        """A latent in the scale of the autoencoder."""
        return latent_CHW / self.scaling_factor

    def _adapters(self, recipe: Recipe) -> LoraStack | None:
        if not recipe.loras:
            return None
        return self._library().stack(recipe.loras, dtype=self.dtype, device=self.device)

    def _library(self) -> LoraLibrary:
        if self.loras is None:
            raise InvalidRequest(
                f"{self.entry.name} runs without a folder of LoRAs; leave loras empty, or start it "
                "with a lora_folder",
                field="loras",
            )
        return self.loras

    def _encode_text(self, recipe: Recipe) -> TextContext:
        with explained("encoding the prompt", "use a smaller model, or another device for it"):
            texts = self.text_encoder.encode([recipe.prompt])
            if recipe.guidance == "classifier-free":
                negative = self.text_encoder.encode_negative([recipe.negative_prompt])
                texts = TextStates.concatenate([negative, texts])
            states_BLC = texts.states_BLC.to(self.device, self.dtype)
            return self.model.encode_text(states_BLC, texts.mask_BL.to(self.device)).aligned()

    def _velocities(self, drafts: Sequence[Draft]) -> Tensor:
        """The guided velocity of every draft, fp32. Rows of a guided batch: −, +, −, +, …"""
        inputs = [draft.sampler.model_input(draft.state) for draft in drafts]
        guidance = drafts[0].recipe.guidance
        rows = 2 if guidance == "classifier-free" else 1
        latents_BCHW = torch.stack([latent for latent, _ in inputs]).to(self.dtype)
        times_B = torch.tensor([time for _, time in inputs], device=self.device)
        scales_B = torch.tensor([d.recipe.guidance_scale for d in drafts], device=self.device)
        config = self.model.config
        network = self.model if self.graphed is None or drafts[0].loras else self.graphed
        velocity_BCHW: Tensor = network(
            latents_BCHW.repeat_interleave(rows, dim=0),
            times_B.repeat_interleave(rows) * config.timestep_scale,
            TextContext.concatenate([draft.text for draft in drafts]),
            guidance_B=scales_B * config.guidance_embeds_scale if guidance == "embedded" else None,
        )
        if guidance != "classifier-free":
            return velocity_BCHW.float()
        return classifier_free(
            velocity_BCHW[0::2], velocity_BCHW[1::2], scales_B[:, None, None, None]
        )


def _library(folder: Path, model: Sana) -> LoraLibrary:
    """Files may name layers as diffusers does, or as the authors of Sana do."""
    diffusers = sana_diffusers_keys(guidance_embedding=model.config.guidance_embedding)
    return LoraLibrary(folder, LayerMap(model, (diffusers, SANA_ORIGINAL)))


def _moved(draft: Draft, velocity_CHW: Tensor) -> Draft:
    noise_CHW = None if draft.noise_TCHW is None else draft.noise_TCHW[draft.state.index]
    return replace(
        draft,
        denoised_CHW=draft.sampler.denoised(draft.state, velocity_CHW),
        state=draft.sampler.step(draft.state, velocity_CHW, noise_CHW),
    )
