"""Train a small Sana on cached latents and cached text states (arXiv 2410.10629, section 3).

Rectified flow: ``x_t = (1 - t) z + t e``, target ``e - z``, ``t = sigmoid(n)``, ``n ~ N(0.3, 1)``.
Axes: B batch, C latent channels, h and w latent height and width, L tokens, S text channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from gesso_core.models.sana import SANA_CONFIGS, Sana, initialize_weights
from gesso_core.train.captions import ANY_STYLE, CaptionRecord
from gesso_core.train.latents import LatentViews, shown_compositions
from gesso_core.train.optimizers import muon_and_adamw
from gesso_core.train.profiles import Profile
from gesso_core.train.progress import ProgressLine, plot_losses
from gesso_core.train.run_state import RunState
from gesso_core.train.schedule import Clock, Ema, learning_rate, set_learning_rate
from gesso_core.train.sprites import STYLES, SpriteSet
from gesso_core.train.text_cache import CaptionStates

SEED = 21
DROP_CAPTION = 0.1  # share of empty captions, for classifier-free guidance
# Exact captions come first: their extra share falls to zero at this part of the budget. Then other
# words for the same things, which are many and each rare, get an extra share.
EXACT_START, EXACT_UNTIL = 0.7, 0.5
KEYWORD_SHARE = 0.35
PLAIN_VIEW = 0.8  # share of pictures that show the sprite unmoved
TIME_MEAN, TIME_STD = 0.3, 1.0
TIMESTEPS = 1000.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch: clean latents with their captions."""

    latent_BChw: Tensor
    text_BLS: Tensor
    mask_BL: Tensor


class CaptionedLatents:
    """Draws batches of (latent, caption states) from the caches."""

    def __init__(
        self,
        sprites: SpriteSet,
        latents: LatentViews,
        records: Sequence[CaptionRecord],
        states: CaptionStates,
    ) -> None:
        self.latents, self.states = latents, states
        self.mean_S, self.std_S = states.statistics()
        self.sprite_of_KS = torch.full((len(sprites.concepts), len(STYLES)), -1)
        self.sprite_of_KS[sprites.concept_of_N, sprites.style_of_N] = torch.arange(
            len(sprites.concept_of_N)
        )
        self.shown_NK = shown_compositions(sprites)
        asked = [(i, r.concept, r.style, r.color, r.named) for i, r in enumerate(records)]
        rows = torch.tensor(asked, dtype=torch.int64)
        allowed_RS = self._allowed(rows[:, 1], rows[:, 3])
        asked_style = rows[:, 2].clamp(min=0)[:, None]
        answered = torch.where(
            rows[:, 2] == ANY_STYLE, allowed_RS.any(dim=1), allowed_RS.gather(1, asked_style)[:, 0]
        )
        self.records_R4 = rows[answered, :4]
        named = rows[answered, 4].bool()
        self.exact_E = (named & (self.records_R4[:, 2] != ANY_STYLE)).nonzero().squeeze(1)
        self.keyword_E = (~named).nonzero().squeeze(1)

    def draw(
        self,
        batch: int,
        generator: Generator,
        *,
        exact_share: float = 0.0,
        keyword_share: float = 0.0,
        plain_share: float = PLAIN_VIEW,
        empty_share: float = DROP_CAPTION,
    ) -> Batch:
        """A random batch; some captions are replaced by the empty one.

        Args:
            batch: number of samples.
            generator: source of all randomness.
            exact_share: share of captions drawn from those that leave nothing open: the concept's
                own name with a style.
            keyword_share: share of captions drawn from those with other words than the name.
            plain_share: share of pictures that are view 0; the others are any other view.
            empty_share: share of captions that are replaced by the empty one.
        """
        caption, sprite, color = self.choose(batch, generator, exact_share, keyword_share)
        moved = torch.randint(1, max(2, self.latents.views), (batch,), generator=generator)
        plain = torch.rand(batch, generator=generator) < plain_share
        view = torch.where(plain | torch.tensor(self.latents.views == 1), 0, moved)
        dropped = torch.rand(batch, generator=generator) < empty_share
        text, mask = self.states.batch(torch.where(dropped, self.states.empty, caption))
        return Batch(
            latent_BChw=self.latents.latents_NKVChw[sprite, color, view].float(),
            text_BLS=(text.float() - self.mean_S) / self.std_S * mask[..., None],
            mask_BL=mask,
        )

    def choose(
        self, batch: int, generator: Generator, exact_share: float = 0.0, keyword_share: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of random captions, and of the sprite and the color that answer each, (B,)."""
        pick = torch.randint(len(self.records_R4), (batch,), generator=generator)
        kind = torch.rand(batch, generator=generator)
        exact = self.exact_E[torch.randint(len(self.exact_E), (batch,), generator=generator)]
        keyword = self.keyword_E[torch.randint(len(self.keyword_E), (batch,), generator=generator)]
        pick = torch.where(kind < exact_share, exact, pick)
        pick = torch.where(kind > 1 - keyword_share, keyword, pick)
        caption, concept, style, color = self.records_R4[pick].unbind(dim=1)
        return caption, self._sprite(concept, style, color, generator), color

    def _allowed(self, concept: Tensor, color: Tensor) -> Tensor:
        """(B, styles) bool: whether a sprite exists and is ever shown on the color."""
        candidates_BS = self.sprite_of_KS[concept]
        return (candidates_BS >= 0) & self.shown_NK[candidates_BS, color[:, None]]

    def _sprite(
        self, concept: Tensor, style: Tensor, color: Tensor, generator: Generator
    ) -> Tensor:
        """The sprite asked for; for any style, a random one that is shown on the color."""
        candidates_BS = self.sprite_of_KS[concept]
        score = torch.rand(candidates_BS.shape, generator=generator) + self._allowed(concept, color)
        chosen = torch.where(style == ANY_STYLE, score.argmax(dim=1), style)
        return candidates_BS.gather(1, chosen[:, None]).squeeze(1)


def flow_loss(model: Sana, batch: Batch, generator: Generator) -> Tensor:
    """Mean square error of the velocity at random times."""
    z = batch.latent_BChw
    noise = torch.randn(z.shape, generator=generator)
    normal = torch.randn(len(z), generator=generator) * TIME_STD + TIME_MEAN
    time = normal.sigmoid()
    mixed = torch.lerp(z, noise, time[:, None, None, None])
    device = next(model.parameters()).device
    velocity = model(
        mixed.to(device),
        (time * TIMESTEPS).to(device),
        batch.text_BLS.to(device),
        batch.mask_BL.to(device),
    )
    target = (noise - z).to(device)
    return torch.mean((velocity.float() - target) ** 2)


def train_denoiser(profile: Profile, data: CaptionedLatents, folder: Path) -> Sana:
    """Train, or continue, the run in ``folder``; returns the averaged model.

    Args:
        profile: sizes and budget.
        data: batches of latents and captions.
        folder: where the state and the loss plot are.
    """
    state = _new_state(profile)
    state.resume(folder / "state.safetensors")
    model = state.model
    assert isinstance(model, Sana)
    progress, saved = ProgressLine("denoiser"), state.clock.used_s
    while state.clock.fraction < 1:
        _update(state, model, profile, data, progress)
        if state.clock.used_s - saved > profile.save_every_s:
            state.save(folder / "state.safetensors")
            saved = state.clock.used_s
    state.save(folder / "state.safetensors")
    state.ema.copy_to(model)
    plot_losses(state.losses, f"{profile.denoiser}: velocity loss", folder / "loss.png")
    return model.eval()


def _new_state(profile: Profile) -> RunState:
    generator = Generator().manual_seed(SEED)
    model = Sana(SANA_CONFIGS[profile.denoiser])
    initialize_weights(model, generator)
    model.to(profile.device)
    nn.init.ones_(model.caption.norm.weight)  # at its usual 0.01 a short run hardly reads the text
    return RunState(
        model=model,
        optimizers=_optimizers(model, profile.denoiser_lr),
        ema=Ema(model, decay=0.999),
        generator=generator,
        clock=Clock(profile.denoiser_s),
    )


def _optimizers(model: Sana, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [
        parameter
        for name, parameter in model.blocks.named_parameters()
        if parameter.ndim == 2 and not name.endswith("table")
    ]
    return muon_and_adamw(model, matrices, rate)


def _update(
    state: RunState,
    model: Sana,
    profile: Profile,
    data: CaptionedLatents,
    progress: ProgressLine,
) -> None:
    rate = learning_rate(
        state.clock.fraction, state.step, peak=profile.denoiser_lr, floor=0.05, hold=0.6, warm_up=50
    )
    set_learning_rate(state.optimizers, rate)
    done = state.clock.fraction
    batch = data.draw(
        profile.denoiser_batch,
        state.generator,
        exact_share=max(0.0, EXACT_START * (1 - done / EXACT_UNTIL)),
        keyword_share=KEYWORD_SHARE if done > EXACT_UNTIL else 0.0,
    )
    loss = state.update(flow_loss(model, batch, state.generator), profile.denoiser_batch)
    shown = progress.update(state.clock.fraction, state.step, loss, profile.denoiser_batch)
    if shown is not None:
        state.losses.append((state.step, shown))
