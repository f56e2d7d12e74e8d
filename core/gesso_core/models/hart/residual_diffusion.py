"""The small network that draws, token by token, what the codes leave of the latent.

Denoising diffusion with a learned range of variances (arXiv 2102.09672) on a per-token MLP
(arXiv 2406.11838, section 3), conditioned on the transformer's state. Residuals are divided by
``residual_range`` and clamped to [-1, 1]. Guidance: ``(1 + t)·conditional - t·unconditional`` for
the noise; the variances are those of the conditional row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gesso_core.layers.embeddings import ScalarEmbedding
from gesso_core.layers.linear import Linear
from gesso_core.models.hart.noise_schedule import NoiseSchedule, variational_bits

# R rows, one per token   C channels of a token   Z channels of the condition   W width

TRAINING_STEPS = 1000
NORM_EPS = 1e-6
Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]
StepNoise = Callable[[int], Tensor]


class ResidualBlock(nn.Module):
    """LayerNorm, modulated → Linear → SiLU → Linear, gated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.hidden = Linear(width, width)
        self.out = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x_RW: Tensor, active_RW: Tensor) -> Tensor:
        """``active_RW`` is SiLU of time plus condition."""
        shift, scale, gate = self.modulation(active_RW).chunk(3, dim=-1)
        y: Tensor = self.out(F.silu(self.hidden(self.norm(x_RW) * (1 + scale) + shift)))
        added: Tensor = x_RW + gate * y
        return added


class ResidualNetwork(nn.Module):
    """Noisy residual, time and condition → predicted noise and variance channels."""

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.time = ScalarEmbedding(width)
        self.condition = Linear(condition, width)
        self.input = Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, 2 * channels)

    def forward(self, x_RC: Tensor, time_R: Tensor, condition_RW: Tensor) -> Tensor:
        """(R, 2·C): noise, then variance channels.

        ``condition_RW`` is embedded already; ``time_R`` may be one time for all rows, (1,).
        """
        active = F.silu(self.time(time_R) + condition_RW)
        hidden: Tensor = self.input(x_RC)
        for block in self.blocks:
            hidden = block(hidden, active)
        shift, scale = self.head_modulation(active).chunk(2, dim=-1)
        normed = F.layer_norm(hidden, (self.width,), eps=NORM_EPS)
        out: Tensor = self.head(normed * (1 + scale) + shift)
        return out


@dataclass(frozen=True)
class DiffusionLosses:
    """Per row: squared error of the noise, and the variational term in bits; their sum."""

    squared_R: Tensor
    variational_R: Tensor
    noisy_RC: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.squared_R + self.variational_R


class ResidualDiffusion(nn.Module):
    """The network with its two schedules: 1000 steps to train, a few to draw."""

    def __init__(
        self,
        *,
        channels: int,
        condition: int,
        width: int,
        depth: int,
        steps: int,
        residual_range: float = 0.6,
    ) -> None:
        super().__init__()
        self.channels, self.residual_range = channels, residual_range
        self.net = ResidualNetwork(channels, condition, width, depth)
        self.training_schedule = NoiseSchedule.squared_cosine(TRAINING_STEPS)
        self.drawing_schedule = self.training_schedule.respaced(steps)

    def losses(
        self, target_RC: Tensor, condition_RZ: Tensor, time_R: Tensor, noise_RC: Tensor
    ) -> DiffusionLosses:
        """Losses at given times (0 … 999) and noise; the target is in units of the latent."""
        schedule = self.training_schedule
        clean = target_RC.float() / self.residual_range
        noisy = schedule.noisy(clean, time_R, noise_RC)
        embedded = self.net.condition(condition_RZ)
        predicted = self.net(noisy.to(embedded.dtype), time_R, embedded).float()
        noise, variance = predicted.chunk(2, dim=-1)
        bits_R = variational_bits(schedule, clean, noisy, time_R, noise.detach(), variance)
        return DiffusionLosses((noise - noise_RC).square().mean(dim=-1), bits_R, noisy)

    def draw_training(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Random times and noise for ``losses``, from a CPU generator: times first."""
        time_R = torch.randint(TRAINING_STEPS, (rows,), generator=generator)
        return time_R, torch.randn((rows, self.channels), generator=generator)

    def predict_guided(
        self, x_RC: Tensor, time: int, condition_2RW: Tensor, guidance_R1: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Guided noise (R, C) and the variance channels of both halves (2R, C), fp32.

        Args:
            x_RC: noisy residuals, fp32.
            time: 0 … 999.
            condition_2RW: embedded conditions, then the unconditional ones.
            guidance_R1: t, one number or one per row.
        """
        both = torch.cat([x_RC, x_RC]).to(condition_2RW.dtype)
        time_1 = torch.full((1,), float(time), device=x_RC.device)
        noise, variance = self.net(both, time_1, condition_2RW).float().chunk(2, dim=-1)
        conditional, unconditional = noise.chunk(2)
        return (1 + guidance_R1) * conditional - guidance_R1 * unconditional, variance

    def sample_guided(
        self,
        condition_RZ: Tensor,
        unconditional_RZ: Tensor,
        guidance_R1: Tensor | float,
        start_RC: Tensor,
        step_noise: StepNoise,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw residuals (R, C) in units of the latent.

        Args:
            condition_RZ: per token, from `HART.residual_condition`.
            unconditional_RZ: the same without text.
            guidance_R1: t; 0 is no guidance, and 1 nothing special.
            start_RC: unit noise to begin with.
            step_noise: the noise (R, C) of step 0, 1, …; not asked for the last one.
            temperature: factor of the step noise.
        """
        embedded_2RW = self.net.condition(torch.cat([condition_RZ, unconditional_RZ]))

        def predict(x_RC: Tensor, time: int) -> tuple[Tensor, Tensor]:
            noise, variance = self.predict_guided(x_RC, time, embedded_2RW, guidance_R1)
            return noise, variance[: len(x_RC)]

        return self.denoise(start_RC, predict, step_noise, temperature)

    def sample(
        self,
        condition_RZ: Tensor,
        start_RC: Tensor,
        step_noise: StepNoise,
        temperature: float = 1.0,
    ) -> Tensor:
        """As `sample_guided`, without guidance."""
        embedded_RW = self.net.condition(condition_RZ)

        def predict(x_RC: Tensor, time: int) -> tuple[Tensor, Tensor]:
            time_1 = torch.full((1,), float(time), device=x_RC.device)
            predicted: Tensor = self.net(x_RC.to(embedded_RW.dtype), time_1, embedded_RW)
            noise, variance = predicted.float().chunk(2, dim=-1)
            return noise, variance

        return self.denoise(start_RC, predict, step_noise, temperature)

    def denoise(
        self, start_RC: Tensor, predict: Predict, step_noise: StepNoise, temperature: float = 1.0
    ) -> Tensor:
        """Ancestral sampling with any prediction of (noise, variance channels)."""
        schedule, x_RC = self.drawing_schedule, start_RC.float()
        for number, index in enumerate(reversed(range(len(schedule)))):
            noise, variance = predict(x_RC, schedule.times[index])
            mean, log_variance = schedule.posterior(x_RC, index, noise, variance)
            if index == 0:
                x_RC = mean
            else:
                spread = (0.5 * log_variance).exp() * temperature
                x_RC = mean + spread * step_noise(number).to(mean.device)
        return x_RC * self.residual_range


def initialize_residual(model: ResidualDiffusion, generator: Generator) -> None:
    """Xavier for matrices, N(0, 0.02) for the time MLP, zero for modulations and the output."""
    net = model.net
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    for layer in (net.time.hidden, net.time.out):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    silent = [net.head_modulation, net.head]
    silent += [block.modulation for block in net.blocks if isinstance(block, ResidualBlock)]
    for layer in silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
