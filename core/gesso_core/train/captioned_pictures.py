"""Pictures with their captions, composed anew for every batch; for models that see pixels.

Axes: B batch, S picture side, T text channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gesso_core.train.captions import CaptionRecord
from gesso_core.train.compose import augment, composite, palette_colors, shrink, sprites_to_float
from gesso_core.train.denoiser import CaptionedLatents
from gesso_core.train.latents import LatentViews, shown_compositions
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.text_cache import CaptionStates

CHUNK = 256


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures and what they show."""

    pixels_B3SS: Tensor  # [-1, 1]
    caption_B: Tensor  # number of a caption that fits
    sprite_B: Tensor
    color_B: Tensor
    concept_B: Tensor


class CaptionedPictures:
    """Draws captions as the denoiser's training does, and composes the pictures that answer them.

    Held-out compositions are never shown.
    """

    def __init__(
        self,
        sprites: SpriteSet,
        records: Sequence[CaptionRecord],
        states: CaptionStates,
        size: int,
    ) -> None:
        """Keep all sprites at the size of the pictures.

        Args:
            sprites: what is shown.
            records: captions.
            states: their text states.
            size: side of the pictures in pixels.
        """
        nothing = LatentViews(latents_NKVChw=torch.empty(0), std=1.0)
        self._captions = CaptionedLatents(sprites, nothing, records, states)
        self.concept_of_N, self.style_of_N = sprites.concept_of_N, sprites.style_of_N
        parts = torch.split(sprites.pixels_NHW4, CHUNK)
        self.sprites_N4SS = torch.cat([shrink(sprites_to_float(part), size) for part in parts])
        self.shown_NK = shown_compositions(sprites)

    def draw(self, batch: int, generator: Generator) -> Pictures:
        """Random captions; half of the sprites unmoved, the others a little moved or mirrored."""
        caption, sprite, color = self._captions.choose(batch, generator)
        views = augment(
            self.sprites_N4SS[sprite],
            generator,
            scale=(0.8, 1.02),
            shift=0.1,
            flip=0.3,
            untouched=0.5,
        )
        pixels = composite(views, palette_colors(color, generator))
        return Pictures(pixels, caption, sprite, color, self.concept_of_N[sprite])

    def compositions(self, sprite_B: Tensor, color_B: Tensor) -> Tensor:
        """Sprites as they are on palette colors, (B, 3, S, S)."""
        return composite(self.sprites_N4SS[sprite_B], palette_colors(color_B))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Sprite and color of all compositions that are never shown, one per sprite."""
        pairs = (~self.shown_NK).nonzero()
        return pairs[:, 0], pairs[:, 1]

    def text_vectors(self, caption_B: Tensor) -> Tensor:
        """Mean text state of captions, normalised by channel, (B, T)."""
        captions = self._captions
        pooled_BT: Tensor = captions.states.pooled(caption_B)
        return (pooled_BT - captions.mean_S) / captions.std_S
